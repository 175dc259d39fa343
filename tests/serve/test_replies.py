"""What the surfaces share: a call that waits for its pictures, streams, the page's files, and what stays of it all."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import io
import sys
from collections.abc import AsyncGenerator, Iterator

import pytest
from PIL import Image
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from stable_diffusion.serve import app, jobs, page
from stable_diffusion.serve.guard import Rules
from stable_diffusion.serve.job import Job
from stable_diffusion.serve.listen import Listener
from stable_diffusion.serve.replies import Stream, encoded, event, finished, json_body, server_of, submit
from tests.serve.served import Gated, Running, data_uri, send, serving, until
from tests.serve.test_guard import resident
from tests.tiny import FINE, tiny_model

ended: list[str] = []


async def draw(request: Request) -> Response:
    """What the compatible surfaces do."""
    fields = await json_body(request)
    job = await submit(request, server_of(request).models.default, fields, client=fields.pop("client", ""))
    return Response(encoded((await finished(request, job))[0]), media_type="image/png")


async def stream(request: Request) -> Response:
    async def forever() -> AsyncGenerator[bytes, None]:
        try:
            while True:
                yield event("more", {"text": "x" * 1000})
                await asyncio.sleep(0.01)
        finally:
            ended.append("generator")

    return Stream(forever(), gone=lambda: ended.append("gone"))


@pytest.fixture(scope="module")
def gated() -> Gated:
    return Gated(tiny_model())


@pytest.fixture(scope="module")
def running(gated: Gated) -> Iterator[Running]:
    more = [Route("/draw", draw, methods=["POST"]), Route("/stream", stream)]
    with serving({"gated": gated}, more=more) as made:
        yield made
        gated.let(10_000)


def test_a_call_waits_for_its_picture(running: Running, gated: Gated) -> None:
    gated.let(100)
    answer = running.post("/draw", {"prompt": "a red circle", "seed": 1})
    assert answer.picture.tobytes() == gated.inner.generate("a red circle", seed=1)[0].tobytes()
    while gated.steps.acquire(blocking=False):
        pass


def test_who_hangs_up_frees_the_place(running: Running, gated: Gated) -> None:
    """In the queue at once, in work within a step; others are not touched."""
    connections = [running.connect() for _ in range(3)]
    before = len(gated.drawn)
    for number, connection in enumerate(connections):
        send(connection, "POST", "/draw", {"prompt": f"{number}", "client": f"{number}"})
        until(lambda: running.jobs.waiting == max(0, number) and running.jobs.running)  # noqa: B023
    connections[1].close()
    until(lambda: running.jobs.waiting == 1)
    connections[0].close()
    first = running.jobs.running
    assert first is not None
    until(first.stop.is_set)
    gated.let()
    until(lambda: first.over)
    assert first.status == "cancelled" and first.pictures == []
    gated.let(100)
    assert connections[2].getresponse().status == 200
    connections[2].close()
    assert gated.drawn[before:] == ["0", "2"]


def test_a_stream_ends_with_its_reader(running: Running) -> None:
    """Both what makes the events, and what is to be called then."""
    with running.events("/stream") as events:
        assert next(events) == ("more", {"text": "x" * 1000})
    until(lambda: len(ended) == 2)
    assert sorted(ended) == ["generator", "gone"]


def test_files_of_pictures() -> None:
    """Transparency lies on white where the format has none; settings are in a PNG alone."""
    model = tiny_model(FINE)
    (picture,) = model.generate("a", seed=1, num_inference_steps=1)
    assert picture.mode == "RGBA"
    picture.putalpha(100)
    for format, mode in (("png", "RGBA"), ("webp", "RGBA"), ("jpeg", "RGB")):
        with Image.open(io.BytesIO(encoded(picture, format))) as read:
            assert (read.format, read.mode) == (format.upper(), mode)
            assert ("minisd" in read.info) == (format == "png")
    clear = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    with Image.open(io.BytesIO(encoded(clear, "jpeg"))) as read:
        assert read.getpixel((8, 8)) == (255, 255, 255)
    sizes = [len(encoded(Image.effect_noise((64, 64), 90), "jpeg", quality)) for quality in (10, 90)]
    assert sizes[0] < sizes[1]


@pytest.mark.parametrize("path", ["/api/jobs", "/v1/images/generations", "/sdapi/v1/txt2img"])
def test_a_body_of_millions_of_values_is_not_parsed(tiny: Running, path: str) -> None:
    """It would hold up everybody for half a minute."""
    answer = tiny.ask(
        "POST", path, b'{"a":[' + b"[]," * 10_000_000 + b"1]}", {"Content-Type": "application/json"}
    )
    assert answer.status == 413 and b"commas" in answer.body
    assert tiny.post(path, {"prompt": "a, " * 3000, "num_inference_steps": 0}).status in (200, 400)


def test_too_many_connections_do_not_flood_the_log(tiny: Running, caplog: pytest.LogCaptureFixture) -> None:
    """asyncio tries to take each 2,048 times a second, with a traceback a time."""
    listener, loop = (
        Listener(app.application(tiny.server, Rules(hosts=frozenset())), tiny.jobs),
        asyncio.new_event_loop(),
    )
    for number in (errno.EMFILE, errno.ENFILE, errno.EMFILE, errno.EIO):
        listener.failed(loop, {"exception": OSError(number, "no more"), "message": "accept"})
    loop.close()
    assert [record.getMessage().partition("\n")[0] for record in caplog.records] == [
        "new clients wait until others are gone: no more",
        "accept",
    ]


@pytest.mark.parametrize("path", page.FILES)
def test_files_of_the_package_are_served_as_what_they_are(tiny: Running, path: str) -> None:
    file = page.FILES[path]
    answer = tiny.get(path)
    assert answer.body == file.content
    assert answer.headers["Content-Type"].partition(";")[0] == file.type
    assert file.type.partition("/")[0] != "text" or "utf-8" in answer.headers["Content-Type"]
    assert tiny.get(path, **{"If-None-Match": file.etag}).status == 304
    assert tiny.get(f"{path}x").status == 404 and tiny.ask("POST", path).status == 405


def test_damaged_weights_are_the_servers_fault(caplog: pytest.LogCaptureFixture) -> None:
    """At each surface, with the part in the sentence and in the log; OpenAI's client does not ask again."""
    model = tiny_model()
    next(model.unet.parameters()).data.fill_(float("nan"))
    body = {"prompt": "a secret wish", "steps": 1}
    with serving({"tiny": model}) as running:
        done = running.over(running.job(prompt="a secret wish", num_inference_steps=1))
        openai = running.post("/v1/images/generations", body)
        webui = running.post("/sdapi/v1/txt2img", body)
    said = [done["error"], openai.json["error"]["message"], webui.json["detail"]]
    assert done["status"] == "failed" and openai.status == webui.status == 500
    assert openai.headers["x-should-retry"] == "false" and openai.json["error"]["type"] == "server_error"
    assert all(sentence.startswith("the U-Net gave NaN") for sentence in said), said
    lines = [
        record.message for record in caplog.records if record.message.startswith("a job failed: the U-Net")
    ]
    assert len(lines) == 3 and "secret" not in caplog.text


def used(server: Running, count: int) -> None:
    """So many requests of all kinds: kept, live, with pictures, cancelled, left, refused."""
    image = data_uri(Image.effect_noise((512, 512), 60).convert("RGB"))
    fields = {"prompt": "a", "num_inference_steps": 2}
    for number in range(count // 5):
        given = {"image": image} if number % 5 == 0 else {}
        id = server.job(**fields, **given)
        with server.events("/api/live", {**fields, "previews": 1, "client": f"page-{number}"}) as events:
            if number % 2:
                list(events)
        assert server.post("/api/jobs", {**fields, "sampler": "none"}).status == 400
        server.ask("DELETE", f"/api/jobs/{server.job(**fields)}")
        server.get(server.over(id)["pictures"][0]["url"])


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_memory_stays_flat(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """However many ask: what is forgotten is gone, and so is all that came with it."""
    monkeypatch.setattr(jobs, "KEPT_BYTES", 1 << 20)
    model = tiny_model()  # of no other server
    with serving({"tiny": model}) as running:
        used(running, 100)
        gc.collect()
        before = resident()
        used(running, count)
        gc.collect()
        assert resident() - before < 10 << 20
        assert len(running.jobs._known) <= (1 << 20) // 4096

        def left_over() -> list[Job]:
            gc.collect()
            jobs_made = [each for each in gc.get_objects() if type(each) is Job and each.model is model]
            return [job for job in jobs_made if job.id not in running.jobs._known or job._watchers]

        until(lambda: not left_over())  # the stream that was left last may be closing


def test_fifty_at_once_all_get_theirs(tiny: Running) -> None:
    """Kept and live jobs from many connections; each stream ends with its own picture."""
    with contextlib.ExitStack() as stack:
        fields = {"prompt": "a", "num_inference_steps": 1}
        streams = [
            stack.enter_context(tiny.events("/api/live", {**fields, "seed": i, "client": f"c{i}"}))
            for i in range(25)
        ]
        ids = [tiny.job(**fields, seed=100 + i, client=f"k{i % 3}") for i in range(25)]
        for seed, each in enumerate(streams):
            found = list(each)
            assert found[-1][0] == "done" and [d["seed"] for n, d in found if n == "picture"] == [seed]
        for i, id in enumerate(ids):
            assert [each["seed"] for each in tiny.over(id)["pictures"]] == [100 + i]
