"""Journeys of ``minisd serve``: what it refuses in one sentence, what it prints, and how it ends."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import stable_diffusion
from stable_diffusion import InputError, cli
from stable_diffusion.cli import serve
from stable_diffusion.serve.door import Served
from stable_diffusion.serve.listen import Listener
from tests.checkpoints.test_lora import kohya, written
from tests.serve.served import PATIENCE, Address, serving
from tests.tiny import tiny_model

SOURCES = str(Path(stable_diffusion.__file__).parents[1])


@pytest.fixture(autouse=True)
def _without_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(serve.KEY, raising=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two models and a LoRA."""
    made = tmp_path_factory.mktemp("models")
    tiny_model().save_pretrained(made / "runs" / "first" / "model")
    tiny_model(seed=1).save_pretrained(made / "second")
    written(kohya(tiny_model()), made / "style.safetensors")
    return made


@dataclass(frozen=True)
class Process(Address):
    """``minisd serve`` as a process, and what it says when it is there."""

    process: subprocess.Popen[str]
    line: str


@contextlib.contextmanager
def started(*arguments: str, **environment: str) -> Iterator[Process]:
    process = subprocess.Popen(
        [sys.executable, "-m", "stable_diffusion", "serve", "--port", "0", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        env={**os.environ, "PYTHONPATH": SOURCES, **environment},
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        match = re.search(r":(\d+)\b", line)
        assert match is not None, process.communicate()
        yield Process(int(match[1]), process, line)
    finally:
        process.kill()
        process.communicate()


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one sentence with which the command ends, with exit code 2."""
    with pytest.raises(SystemExit) as end:
        cli.main(["serve", *arguments])
    captured = capsys.readouterr()
    assert end.value.code == 2 and captured.out == ""
    assert captured.err.startswith("minisd: ") and captured.err.count("\n") == 1, captured.err
    return captured.err


def test_other_machines_need_a_key(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty one is none."""
    for _ in range(2):
        assert "lets other machines in" in refusal(capsys, "--host", "0.0.0.0", "--port", "0")
        monkeypatch.setenv(serve.KEY, "")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--api-key", ""], "the key must be"),
        (["--api-key", "two words"], "the key must be"),
        (["--api-key", "schlüssel"], "the key must be"),
        (["--allow-origin", "*"], "must be one site"),
        (["--allow-origin", "example.org"], "must be one site"),
        (["--allow-origin", "https://example.org/path"], "must be one site"),
        (["--allow-host", "example.org:80"], "must be a name without a port"),
        (["--allow-host", "http://example.org"], "must be a name without a port"),
        (["--port", "65536"], "port must be from 0 to 65535"),
        (["--host", "nowhere.invalid"], "this machine has no address 'nowhere.invalid'"),
        (["--host", "203.0.113.1", "--port", "0"], "cannot listen at 203.0.113.1"),
        (["--prompt-syntax", "other"], "other"),
        (["--port", "0", "nothing-there"], "nothing-there"),
        (["--port", "0", "--lora", "nothing-there"], "nothing-there"),
        (["--port", "0", "--device", "abacus"], "there is no device 'abacus' here"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_cannot_be_served_is_a_sentence(
    capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert said in refusal(capsys, *arguments)


def test_a_port_in_use_is_a_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a model is read."""
    monkeypatch.setattr(serve, "loaded", None)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        assert f"port {port} is in use" in refusal(capsys, "--port", port)


def test_without_the_extra(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else find(name))
    assert "pip install 'mini-stable-diffusion[serve]'" in refusal(capsys)


def test_names_of_models(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As their folders and files, which are unlike; what training wrote as the folder that it is in."""
    first, second = str(folder / "runs" / "first" / "model"), str(folder / "second")
    assert [each.name for each in serve.loaded([first, second], [], [], None, "cpu")] == ["first", "second"]
    assert serve._name("owner/name") == "name"
    assert serve._name("some/v1-5.safetensors") == "v1-5"
    monkeypatch.chdir(second)
    assert serve._name(".") == "second"
    with pytest.raises(InputError, match="two models are called second"):
        serve.loaded([second, "."], [], [], None, "cpu")


def test_loras_are_named_at_the_start(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By their files' names, for each model that they fit; a request weighs them."""
    served = serve.loaded([str(folder / "second")], [f"{folder / 'style.safetensors'}:0.5"], [], None, "cpu")
    assert served[0].loras == {"style": 0.5} and "style.safetensors" in capsys.readouterr().err
    model = served[0].model
    with serving({"second": model}) as running:
        assert running.get("/api/models").json["models"][0]["loras"] == {"style": 0.5}
        for asked, lora in (
            ({}, {"style": 0.5}),
            ({"lora": {"style": -1.0}}, {"style": -1.0}),
            ({"lora": {}}, {}),
        ):
            (found,) = running.over(running.job(prompt="a red circle", seed=3, **asked))["pictures"]
            assert found["settings"].get("lora", {}) == lora
            expected = model.generate("a red circle", seed=3, lora=lora)[0]
            assert running.get(found["url"]).picture.tobytes() == expected.tobytes()
    copy = tmp_path / "style.safetensors"
    copy.write_bytes((folder / "style.safetensors").read_bytes())
    with pytest.raises(InputError, match="already"):
        serve.loaded(
            [str(folder / "second")], [str(folder / "style.safetensors"), str(copy)], [], None, "cpu"
        )


def test_it_says_where_it_is_and_ends_within_a_step() -> None:
    """On SIGTERM: a picture of 150 steps, those that wait and their streams end, and nothing has failed."""
    long = {"prompt": "a fox", "num_inference_steps": 150}
    with started() as server:
        assert server.line == f"minisd serves icons-128 at {server.url}\n"
        assert server.get("/health").json == {"status": "ok", "waiting": 0, "running": False}
        with server.events("/api/live", long) as drawn, server.events("/api/live", long) as waiting:
            assert next(name for name, _ in drawn if name == "step")
            began = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            assert [list(stream)[-1] for stream in (drawn, waiting)] == [("cancelled", {})] * 2
        assert server.process.wait(PATIENCE) == 0
        assert time.monotonic() - began < 20
        assert server.process.communicate()[1] == "minisd: stopped\n"
        with pytest.raises(OSError):
            server.get("/health")


def test_a_key_of_the_environment_and_everywhere() -> None:
    """Other machines reach it by its addresses; Ctrl-C ends it."""
    with started("--host", "0.0.0.0", "--allow-host", "Proxy.example", MINISD_API_KEY="secret") as server:
        assert server.line.endswith(f"{server.url} and at this machine's other addresses\n")
        assert server.get("/api/models").status == 401
        assert server.get("/api/models", Authorization="Bearer secret").status == 200
        for host, status in (("proxy.example", 200), ("evil.example", 400)):
            assert server.get("/health", Host=host).status == status
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(PATIENCE) == 0


def test_the_page_opens_when_it_is_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    monkeypatch.setattr(serve, "loaded", lambda *_: [Served(name="tiny", model=tiny_model(), created=1)])
    startup = Listener.startup

    async def once(self: Listener, sockets: list[socket.socket] | None = None) -> None:
        await startup(self, sockets)
        self.should_exit = True

    monkeypatch.setattr(Listener, "startup", once)
    cli.main(["serve", "--port", "0", "--open"])
    captured = capsys.readouterr()
    assert captured.err == "minisd: stopped\n"
    assert [f"minisd serves tiny at {address}\n" for address in opened] == [captured.out]


TWICE = """
import signal
from stable_diffusion import cli
from stable_diffusion.serve.listen import Listener

def run(self, sockets):
    signal.raise_signal(signal.SIGTERM)
    print(self.should_exit, flush=True)
    signal.raise_signal(signal.SIGTERM)
    print("still there")

Listener.run = run
cli.main(["serve", "--port", "0"])
"""


def test_a_second_signal_waits_for_nothing() -> None:
    """The first one lets the server end by itself; another ends the process, whatever its threads compute."""
    command = [sys.executable, "-c", TWICE]
    environment = {**os.environ, "PYTHONPATH": SOURCES}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (128 + signal.SIGTERM, "True\n")
    assert ended.stderr == "minisd: stopped\n"


@pytest.mark.parametrize("seconds", [0.1, 0.3, 0.8, 1.2])
def test_stopped_while_it_begins(seconds: float) -> None:
    """Whenever Ctrl-C comes: in the interpreter's own start, while torch is imported, while the model is read."""
    command = [sys.executable, "-m", "stable_diffusion", "serve", "--port", "0"]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": SOURCES}
    )
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode in (0, 128 + signal.SIGINT, -signal.SIGINT)
    assert (
        said in ("", "minisd: stopped\n") or "stable_diffusion" not in said
    )  # Python's, before a line of ours
