"""Hub names: the cache on this machine first, and a clear word where neither cache nor network has the model."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest

from stable_diffusion import DiffusionModel, InputError
from stable_diffusion.checkpoints import hub
from tests.checkpoints import sd
from tests.tiny import tiny_model

PUBLISHED = [
    *("README.md", "model_index.json", "v1-5-pruned.ckpt", "v1-5-pruned.safetensors"),
    *("feature_extractor/preprocessor_config.json", "safety_checker/model.safetensors"),
    *("scheduler/scheduler_config.json", "text_encoder/config.json", "text_encoder/model.fp16.safetensors"),
    *("text_encoder/model.safetensors", "text_encoder/pytorch_model.bin", "tokenizer/merges.txt"),
    *("tokenizer/special_tokens_map.json", "tokenizer/tokenizer_config.json", "tokenizer/vocab.json"),
    *(
        "unet/config.json",
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.fp16.safetensors",
    ),
    *("unet/diffusion_pytorch_model.non_ema.safetensors", "unet/diffusion_pytorch_model.safetensors"),
    *("vae/config.json", "vae/diffusion_pytorch_model.bin", "vae/diffusion_pytorch_model.safetensors"),
]


def test_only_what_is_read_is_downloaded() -> None:
    wanted = hub.needed(PUBLISHED)
    assert [name for name in wanted if name.endswith((".safetensors", ".bin", ".ckpt"))] == [
        "text_encoder/model.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    assert {"model_index.json", "tokenizer/vocab.json", "tokenizer/merges.txt", "unet/config.json"} <= set(
        wanted
    )
    assert not any(name.startswith(("safety_checker", "feature_extractor")) for name in wanted)
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in hub.needed(PUBLISHED, "fp16")
    assert hub.needed(["README.md", "model.safetensors"]) == []


def test_half_a_snapshot_is_not_taken_for_a_whole_one() -> None:
    shards = [f"unet/diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    names = [name for name in PUBLISHED if not name.startswith("unet/diffusion")]
    names.append("unet/diffusion_pytorch_model.safetensors.index.json")
    assert hub.is_whole(PUBLISHED)
    assert not hub.is_whole(names)
    assert not hub.is_whole([*names, shards[0]])
    assert hub.is_whole([*names, *shards])
    assert not hub.is_whole([name for name in PUBLISHED if "fp16" not in name], "fp16")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, and the hub's cache beside it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_ETAG_TIMEOUT", 0.5)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


@contextmanager
def hub_at(monkeypatch: pytest.MonkeyPatch, url: str) -> Iterator[None]:
    """A client of its own, which asks that server."""
    huggingface_hub.close_session()
    with monkeypatch.context() as patched:
        patched.setattr("huggingface_hub.constants.ENDPOINT", url)
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        patched.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield
    huggingface_hub.close_session()


@contextmanager
def server(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def hub_of(folder: Path) -> tuple[type[BaseHTTPRequestHandler], list[str]]:
    """A hub that has one model, owner/tiny-sd, and the paths that it is asked for."""
    asked: list[str] = []
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            asked.append(path)
            _, _, file = path.partition(f"/resolve/{SHA}/")
            if path in ("/api/models/owner/tiny-sd", "/api/models/owner/tiny-sd/revision/main"):
                listed = [{"rfilename": name} for name in files]
                self.answer(json.dumps({"id": "owner/tiny-sd", "sha": SHA, "siblings": listed}).encode())
            elif path == f"/api/models/owner/tiny-sd/tree/{SHA}":
                tree = [
                    {"type": "file", "path": name, "size": path.stat().st_size, "oid": f"{i:040x}"}
                    for i, (name, path) in enumerate(files.items())
                ]
                self.answer(json.dumps(tree).encode())
            elif file in files:
                self.answer(files[file].read_bytes(), etag=f"{[*files].index(file):040x}")
            else:
                self.send_error(404)

        do_HEAD = do_GET

        def answer(self, content: bytes, etag: str | None = None) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("X-Repo-Commit", SHA)
            if etag:
                self.send_header("ETag", f'"{etag}"')
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    return Handler, asked


SHA = "0" * 40


def test_what_is_downloaded_opens_without_the_network(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the hub has files that are not read, and so are not in the cache."""
    published = sd.write(here / "sd", "1.5")
    (published / "safety_checker").mkdir()
    (published / "safety_checker" / "model.safetensors").write_bytes(b"unread")
    handler, asked = hub_of(published)
    with server(handler) as url, hub_at(monkeypatch, url):
        folder = hub.find("owner/tiny-sd")
        assert asked and not any("safety_checker" in path for path in asked)
        asked.clear()
        assert hub.find("owner/tiny-sd") == folder and not asked
        (here / "here" / "owner").mkdir()  # which does not hide it
        assert hub.find("owner/tiny-sd") == folder and not asked
        with pytest.raises(
            InputError,
            match=r"owner/tiny-ds does not exist: give a model folder or a file of weights; .* a folder here",
        ):
            hub.find("owner/tiny-ds")
        assert not asked, "a path that is mistyped was sent to the hub"
    with hub_at(monkeypatch, "http://127.0.0.1:9"):
        assert DiffusionModel.from_pretrained("owner/tiny-sd").origin["model"] == "owner/tiny-sd"
    (here / "here" / "owner" / "tiny-sd").mkdir()
    assert hub.find("owner/tiny-sd") == Path("owner/tiny-sd")


def _status(code: int) -> type[BaseHTTPRequestHandler]:
    handler, _ = hub_of(Path("nothing"))
    return type("Handler", (handler,), {"do_GET": lambda self: self.send_error(code)})


def _silent() -> type[BaseHTTPRequestHandler]:
    handler, _ = hub_of(Path("nothing"))
    return type("Handler", (handler,), {"do_GET": lambda self: time.sleep(2)})


def _garbage() -> type[BaseHTTPRequestHandler]:
    handler, _ = hub_of(Path("nothing"))
    return type("Handler", (handler,), {"do_GET": lambda self: self.answer(b"<html>log in to this network")})


REFUSED = "http://127.0.0.1:9"


@pytest.mark.parametrize(
    ("hub_or_url", "proxy"),
    [
        *((_status(code), None) for code in (401, 404, 429, 500, 503)),
        (_silent(), None),
        (_garbage(), None),
        *((url, None) for url in (REFUSED, "http://no-such-host.invalid", "nonsense")),
        *((REFUSED, proxy) for proxy in (REFUSED, "foo://127.0.0.1:9", "socks5://127.0.0.1:9")),
    ],
    ids=[
        *("401", "404", "429", "500", "503", "silent", "garbage", "refused", "no DNS", "no URL"),
        *("proxy refused", "no proxy", "SOCKS"),
    ],
)
def test_a_hub_that_gives_nothing_is_one_sentence_at_once(
    hub_or_url: type[BaseHTTPRequestHandler] | str,
    proxy: str | None,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if proxy is not None:
        monkeypatch.setenv("HTTP_PROXY", proxy)
    place = nullcontext(hub_or_url) if isinstance(hub_or_url, str) else server(hub_or_url)
    with place as url, hub_at(monkeypatch, url):
        began = time.monotonic()
        with pytest.raises(
            InputError, match=r"^models/sd15 does not exist: give a model folder or a file of weights; .*\)$"
        ) as error:
            DiffusionModel.from_pretrained("models/sd15")
        assert time.monotonic() - began < 5
    assert "\n" not in str(error.value) and not caplog.records


def check_never_sent(path: str | Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handler, asked = hub_of(here)
    with (
        server(handler) as url,
        hub_at(monkeypatch, url),
        pytest.raises(
            InputError,
            match=f"^{re.escape(f'{path} does not exist: give a model folder, a file of weights, or a hub name')}",
        ),
    ):
        DiffusionModel.from_pretrained(path)
    assert not asked


@pytest.mark.parametrize(
    "path",
    [
        "nowhere",
        "/a/b",
        "./a/b",
        "a/b/c",
        "../b",
        "a/../b",
        "owner/",
        "https://huggingface.co/a/b",
        Path("a/b"),
    ],
)
def test_what_is_no_name_is_never_sent(path: str | Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_never_sent(path, here, monkeypatch)


def test_a_path_stays_one_in_what_is_stored(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that was read as models/sd15 is not looked for on the hub by who makes the picture again."""
    tiny_model().save_pretrained("models/sd15")
    model = DiffusionModel.from_pretrained("models/sd15")
    stored = model.request("a").to_dict()["model"]
    assert DiffusionModel.from_pretrained(stored).origin == model.origin
    shutil.rmtree("models")
    assert stored.endswith("models/sd15")
    check_never_sent(stored, here, monkeypatch)


def test_the_cache_is_enough_and_without_it_the_message_is_clear(tmp_path: Path) -> None:
    """In the hub's own layout, in a process that is told to stay offline."""
    repository = tmp_path / "home" / "hub" / "models--owner--tiny-sd"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(sd.write(tmp_path / "sd", "1.5"), repository / "snapshots" / ("0" * 40))
    code = """if True:
        from stable_diffusion.cli import main
        main(["info", "owner/tiny-sd"])
        main(["info", "owner/another"])
    """
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "diffusers folder" in ran.stdout, ran.stderr
    assert ran.returncode == 2
    (line,) = ran.stderr.strip().splitlines()
    assert line.startswith(
        "minisd: owner/another does not exist: give a model folder or a file of weights; as a name of the Hugging"
    )
    assert "not whole in the cache, and the network did not give it" in line


def test_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=r"pip install 'mini-stable-diffusion\[hub\]'"):
        DiffusionModel.from_pretrained("owner/model")
