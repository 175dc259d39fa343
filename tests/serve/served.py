"""A server in a thread, and what asks it: bytes over a socket, as any program sends them."""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image
from starlette.routing import Route

from stable_diffusion.model import DiffusionModel
from stable_diffusion.serve.app import application
from stable_diffusion.serve.door import Models, Served
from stable_diffusion.serve.guard import Rules
from stable_diffusion.serve.job import Job
from stable_diffusion.serve.jobs import Jobs
from stable_diffusion.serve.listen import Listener, bound
from stable_diffusion.serve.replies import Server

PATIENCE = 120.0
"""Seconds: a test waits for what it waits for, however busy the machine is."""
HOSTS = frozenset({"localhost", "127.0.0.1"})


@dataclass(frozen=True)
class Answer:
    """What came back."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def picture(self) -> Image.Image:
        return Image.open(io.BytesIO(self.body))


@dataclass(frozen=True)
class Address:
    """Where a server is, and how to ask it."""

    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)

    def ask(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> Answer:
        """One request on a connection of its own; anything but bytes is sent as JSON."""
        with contextlib.closing(self.connect()) as connection:
            send(connection, method, path, body, headers)
            return received(connection)

    def get(self, path: str, **headers: str) -> Answer:
        return self.ask("GET", path, headers=headers)

    def post(self, path: str, body: Any, **headers: str) -> Answer:
        return self.ask("POST", path, body, headers)

    def job(self, **fields: Any) -> str:
        """A job's id."""
        answer = self.post("/api/jobs", fields)
        assert answer.status == 202, answer.body
        return str(answer.json["id"])

    def over(self, id: str) -> dict[str, Any]:
        """What a job says when it is over."""
        found: dict[str, Any] = {}

        def ended() -> bool:
            found.update(self.get(f"/api/jobs/{id}").json)
            return found["status"] in ("done", "failed", "cancelled")

        until(ended)
        return found

    @contextlib.contextmanager
    def events(self, path: str, body: Any = None) -> Iterator[Iterator[tuple[str, Any]]]:
        """The events of a stream, which is closed at the end of the block."""
        connection = self.connect()
        try:
            send(connection, "GET" if body is None else "POST", path, body)
            response = connection.getresponse()
            assert response.status == 200, response.read()
            assert response.headers["Content-Type"].startswith("text/event-stream")
            yield parsed(response)
        finally:
            if connection.sock is not None:
                connection.sock.close()
            connection.close()


@dataclass(frozen=True)
class Running(Address):
    """A server in this process, and what is inside."""

    server: Server

    @property
    def jobs(self) -> Jobs:
        return self.server.jobs


def send(
    connection: http.client.HTTPConnection,
    method: str,
    path: str,
    body: Any = None,
    headers: Mapping[str, str] | None = None,
) -> None:
    sent = dict(headers or {})
    if body is not None and not isinstance(body, bytes):
        body = json.dumps(body).encode()
        sent.setdefault("Content-Type", "application/json")
    connection.request(method, path, body, sent)


def received(connection: http.client.HTTPConnection) -> Answer:
    response = connection.getresponse()
    return Answer(response.status, response.headers, response.read())


def parsed(stream: Any) -> Iterator[tuple[str, Any]]:
    """Names and data of server-sent events, as they come."""
    name = ""
    for line in stream:
        text = line.decode().rstrip("\n")
        if text.startswith("event: "):
            name = text[7:]
        elif text.startswith("data: "):
            yield name, json.loads(text[6:])


def until(holds: Callable[[], object], seconds: float = PATIENCE) -> None:
    """Waits until something holds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never was"
        time.sleep(0.01)


@contextlib.contextmanager
def serving(
    models: Mapping[str, Any], *, more: Iterable[Route] = (), proxied: bool = False, **rules: Any
) -> Iterator[Running]:
    """A server of these models, the first of which is the default one.

    Args:
        models: by name.
        more: routes beside the application's.
        proxied: whether it stands behind a proxy.
        rules: fields of ``Rules``.
    """
    served = [Served(name=name, model=model, created=1) for name, model in models.items()]
    jobs = Jobs()
    server = Server(models=Models(served), jobs=jobs)
    ready = threading.Event()
    app = application(server, Rules(**{"hosts": HOSTS, **rules}), more)
    listener = Listener(app, jobs, ready.set, proxied=proxied)
    with contextlib.closing(bound("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=listener.run, args=([listening],), daemon=True)
        thread.start()
        assert ready.wait(PATIENCE)
        try:
            yield Running(listening.getsockname()[1], server)
        finally:
            listener.should_exit = True
            thread.join(PATIENCE)
            assert not thread.is_alive()


class Gated:
    """A model that takes a step when it is let: real pictures, at the test's pace."""

    def __init__(self, model: DiffusionModel) -> None:
        self.inner = model
        self.steps = threading.Semaphore(0)
        self.drawn: list[str] = []
        """The prompts of the pictures that were begun."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def let(self, steps: int = 1) -> None:
        """Lets it take so many steps more."""
        self.steps.release(steps)

    def stream(self, request: Any) -> Any:
        self.drawn.append(request.prompt[0])
        steps = self.inner.stream(request)
        try:
            while True:
                assert self.steps.acquire(timeout=PATIENCE)
                try:
                    yield next(steps)
                except StopIteration as end:
                    return end.value
        finally:
            steps.close()


def data_uri(picture: Image.Image) -> str:
    content = io.BytesIO()
    picture.save(content, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"


def gated_job(model: Gated, prompt: str, **settings: Any) -> Job:
    """A job of one step."""
    return Job(model=model, request=model.request(prompt, seed=0, num_inference_steps=1), **settings)
