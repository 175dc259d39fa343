"""The words of docs/serving.md are true: its nginx file before two workers, and its calls of curl."""

from __future__ import annotations

import http.client
import json
import re
import shlex
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.serve.served import HOSTS, Address, Running, serving, until
from tests.tiny import tiny_model

DOCS = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
ADDRESSES = [f"127.0.0.{last}" for last in range(1, 13)]
NAME = "pictures.example.org"


@dataclass(frozen=True)
class From(Address):
    """The balancer, asked from one of this machine's addresses."""

    source: str

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60, source_address=(self.source, 0))


@dataclass(frozen=True)
class Balanced:
    """Two workers and the port of what stands before them."""

    workers: dict[str, Running]
    stacks: dict[str, ExitStack]
    port: int


@pytest.fixture
def balanced(tmp_path: Path) -> Iterator[Balanced]:
    nginx = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if nginx is None:
        pytest.skip("there is no nginx here")
    (file,) = re.findall(r"```nginx\n(.*?)```", DOCS, re.S)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    stacks = {"7861": ExitStack(), "7862": ExitStack()}
    workers = {}
    for name, stack in stacks.items():
        running = stack.enter_context(serving({name: tiny_model()}, hosts=HOSTS | {NAME}, proxied=True))
        workers[name] = running
        assert f"127.0.0.1:{name};" in file
        file = file.replace(f"127.0.0.1:{name};", f"127.0.0.1:{running.port};")
    file = file.replace("listen 8080;", f"listen 127.0.0.1:{port};")
    paths = [
        f"{kind}_temp_path {tmp_path / kind};"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    ]
    file = file.replace("http {", "\n".join(["http {", "access_log off;", *paths]))
    head = f"pid {tmp_path / 'nginx.pid'};\nerror_log {tmp_path / 'error.log'};\ndaemon off;\nmaster_process off;\n"
    (tmp_path / "nginx.conf").write_text(head + file)
    process = subprocess.Popen(
        [nginx, "-p", str(tmp_path), "-c", "nginx.conf", "-e", str(tmp_path / "error.log")]
    )

    def answers() -> bool:
        assert process.poll() is None, (tmp_path / "error.log").read_text()
        with socket.socket() as trial:
            return trial.connect_ex(("127.0.0.1", port)) == 0

    try:
        until(answers)
        yield Balanced(workers, stacks, port)
    finally:
        process.terminate()
        process.wait(60)
        for stack in stacks.values():
            stack.close()


def worker(client: From) -> str:
    """Which one answers a client."""
    return str(client.get("/api/models").json["models"][0]["name"])


def test_two_workers_behind_nginx(balanced: Balanced) -> None:
    """Every address has a worker of its own, where its jobs are; when that is gone, the other one's."""
    clients = [From(balanced.port, source) for source in ADDRESSES]
    first = {client.source: worker(client) for client in clients}
    assert set(first.values()) == {"7861", "7862"}
    assert first == {client.source: worker(client) for client in clients}

    one = clients[0]
    id = one.job(prompt="a", seed=3, num_images_per_prompt=2)
    with one.events(f"/api/jobs/{id}/events") as events:
        assert [name for name, _ in events][-1] == "done"
    assert one.get(one.over(id)["pictures"][1]["url"]).status == 200
    body = b'{"prompt": "' + b"x" * (4 << 20) + b'"}'
    assert one.post("/api/jobs", body, **{"Content-Type": "application/json"}).status == 400, (
        "it came through"
    )

    mine = balanced.workers[first[one.source]]
    with one.events("/api/live", {"prompt": "a", "num_inference_steps": 150}) as events:
        assert next(name for name, _ in events if name in ("queued", "step"))
    until(lambda: mine.jobs.running is None)

    own = {"Host": f"{NAME}:{balanced.port}", "Origin": f"http://{NAME}:{balanced.port}"}
    short = {"prompt": "a", "num_inference_steps": 1}
    assert one.post("/api/jobs", short, **own).status == 202
    assert one.post("/api/jobs", short, **{**own, "Origin": "http://evil.example"}).status == 403
    assert one.post("/api/jobs", short, Host="evil.example").status == 400

    balanced.stacks[first[one.source]].close()
    assert {worker(client) for client in clients} == set(first.values()) - {first[one.source]}


def test_clients_of_a_worker_take_turns_by_their_addresses(balanced: Balanced) -> None:
    clients = [From(balanced.port, source) for source in ADDRESSES[:6]]
    for client in clients:
        client.job(prompt="a", num_inference_steps=1)
    known = {job.client for running in balanced.workers.values() for job in running.jobs._known.values()}
    assert known == set(ADDRESSES[:6])


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl here")
def test_calls_of_curl(tiny: Running, tmp_path: Path) -> None:
    """As they stand there, with the job's id."""
    lines = re.findall(r"^    (curl .*)$", DOCS, re.M)
    assert len(lines) == 5
    id = ""
    for line in lines:
        words = shlex.split(line.replace("http://127.0.0.1:7860", tiny.url).replace("ID", id))
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, check=True)
        if not id:
            id = json.loads(done.stdout)["id"]
            tiny.over(id)
    assert (tmp_path / "fox.png").read_bytes().startswith(b"\x89PNG")
