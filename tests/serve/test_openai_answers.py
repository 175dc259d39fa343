"""Journeys: streams at /v1, what is refused there, and askers that wait, go away, or have no key."""

from __future__ import annotations

import json
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from stable_diffusion.serve import jobs
from tests.serve.openai_files import QUICK, file, half_erased, opened, photo
from tests.serve.served import PATIENCE, Gated, Running, gated_job, serving, until
from tests.tiny import tiny_model

openai = pytest.importorskip("openai")

LONG = {"model": "icons-128", "prompt": "a fox", "extra_body": {"steps": 60}}
"""Some seconds, unless it is cancelled."""


# Streams.


def test_a_stream_of_partial_images(openai_client: Any) -> None:
    """They come before the picture, which is the one without a stream, in files of its size."""
    asked = {
        "prompt": "a fox",
        "model": "icons-128",
        "extra_body": {"seed": 1, "steps": 4},
        "size": "160x160",
    }
    *partial, last = openai_client.images.generate(**asked, stream=True, partial_images=3)
    assert {event.type for event in partial} == {"image_generation.partial_image"}
    assert 1 <= len(partial) <= 3 and [event.partial_image_index for event in partial] == [
        *range(len(partial))
    ]
    assert last.type == "image_generation.completed" and last.usage.total_tokens == 0
    assert last.b64_json == openai_client.images.generate(**asked).data[0].b64_json != partial[-1].b64_json
    for event in (*partial, last):
        assert opened(event).size == (160, 160) and abs(event.created_at - time.time()) < 60
        assert (event.size, event.output_format, event.background) == ("160x160", "png", "opaque")


@pytest.mark.parametrize("count", [None, 0, 1, 2])
def test_a_stream_has_no_more_than_was_asked_for(openai_client: Any, count: int | None) -> None:
    """Of an edit too, in its own words."""
    more = {} if count is None else {"partial_images": count}
    asked = {"image": file(photo()), "output_format": "webp", **QUICK}
    *partial, last = openai_client.images.edit(**asked, **more, stream=True)
    assert len(partial) <= (count or 0) and {event.type for event in partial} <= {"image_edit.partial_image"}
    assert last.type == "image_edit.completed" and opened(last).format == "WEBP" and last.seed >= 0


def test_an_error_in_a_stream(openai_client: Any) -> None:
    """What shows only while it draws is an error there; without a stream it has its status."""
    mask = Image.new("RGBA", photo().size, "white")
    mask.putpixel((1, 1), (0, 0, 0, 0))
    asked = {"image": file(photo()), "mask": file(mask), "prompt": "a fox", "model": "icons-128"}
    with pytest.raises(openai.APIError, match="lies between the latents") as streamed:
        list(openai_client.images.edit(**asked, stream=True))
    assert streamed.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError, match="lies between the latents"):
        openai_client.images.edit(**asked)


# Refusals.

REFUSED = [
    ({"n": 0}, "n"),
    ({"n": 11}, "n"),
    ({"n": "3"}, "n"),
    ({"size": "big"}, "size"),
    ({"size": "4096x64"}, "size"),
    ({"size": "0x64"}, "size"),
    ({"size": 64}, "size"),
    ({"response_format": "file"}, "response_format"),
    ({"output_format": "gif"}, "output_format"),
    ({"output_format": "svg"}, "output_format"),
    ({"output_format": "jpeg", "output_compression": 101}, "output_compression"),
    ({"output_compression": 50}, "output_compression"),
    ({"partial_images": 4, "stream": True}, "partial_images"),
    ({"stream": True, "n": 2}, "n"),
    ({"stream": True, "response_format": "url"}, "response_format"),
    ({"stream": "yes"}, "stream"),
    ({"background": "transparent"}, "background"),
    ({"background": "blue"}, "background"),
    ({"model": ["tiny"]}, "model"),
    ({"prompt": 5}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": "a" * 10_001}, "prompt"),
    ({"frame_count": 9}, "frame_count"),
    ({"svg": {"model": "x"}}, "svg"),
    ({"extra_body": {"seed": -1}}, "seed"),
    ({"extra_body": {"seed": 1.5}}, "seed"),
    ({"extra_body": {"steps": 151}}, "steps"),
    ({"extra_body": {"steps": "many"}}, "steps"),
    ({"extra_body": {"guidance_scale": "high"}}, "guidance_scale"),
    ({"extra_body": {"guidance_scale": 1e299}}, "guidance_scale"),
    ({"extra_body": {"sampler": "best"}}, "sampler"),
    ({"extra_body": {"strength": 0}}, "strength"),
    ({"extra_body": {"negative_prompt": 7}}, "negative_prompt"),
    ({"extra_body": {"lora": {"x": 1}}}, "lora"),
]


@pytest.mark.parametrize(("fields", "param"), REFUSED, ids=lambda value: json.dumps(value)[:40])
def test_what_is_refused(openai_client: Any, fields: dict[str, Any], param: str) -> None:
    """With a sentence that names the field, as the client calls it."""
    with pytest.raises(openai.BadRequestError) as refused:
        openai_client.images.generate(**{**QUICK, **fields})
    error = refused.value
    assert error.param == param and param in error.body["message"].lower(), error
    assert error.type == "invalid_request_error" and error.request_id.startswith("req_")


def test_edits_that_are_refused(openai_client: Any) -> None:
    content = file(photo())
    bomb = file(Image.new("1", (5_000, 5_000)))
    cases = [
        ({"image": [content, content]}, "image"),
        ({"image": []}, "image"),
        ({"image": b"no picture"}, "image"),
        ({"image": bomb}, "image"),
        ({"image": file(Image.new("1", (16_385, 1)))}, "image"),
        ({"image": content[:200]}, "image"),
        ({"image": content, "mask": b""}, "mask"),
        ({"image": content, "mask": file(half_erased((128, 64)))}, "mask"),
        ({"image": content, "mask": file(Image.new("RGBA", (128, 128), "white"))}, "mask"),
        ({"image": content, "mask": file(Image.new("L", (128, 128)))}, "mask"),
        ({"image": content, "markup": content}, "markup"),
        ({"image": content, "svg": {"model": "x"}}, "svg"),
        ({"image": content, "n": 11}, "n"),
        ({"image": content, "background": "transparent"}, "background"),
        ({"image": content, "extra_body": {"strength": 1.5}}, "strength"),
        ({"image": content, "extra_body": {"steps": "NaN"}}, "steps"),
        ({"image": content, "stream": True, "n": 2}, "n"),
    ]
    for fields, param in cases:
        with pytest.raises(openai.BadRequestError) as refused:
            openai_client.images.edit(**QUICK, **fields)
        error = refused.value
        assert error.param == param and param in error.body["message"].lower(), error
        assert error.request_id.startswith("req_")


def test_bodies_that_are_not_what_they_should_be(openai_client: Any, several: Running) -> None:
    sent = [
        ("images/generations", "text/plain", b"{}", 415),
        ("images/generations", "application/json", b"[1]", 400),
        ("images/generations", "application/json", b"{", 400),
        ("images/edits", "application/json", b'{"prompt": "a fox"}', 415),
        ("images/edits", "multipart/form-data", b"", 400),
        ("images/edits", "multipart/form-data; boundary=x", b"--y\r\nfoo", 400),
        ("images/edits", "multipart/form-data; boundary=x; charset=punycode", b"", 415),
        ("images/edits", "multipart/form-data; boundary=x; charset=unicode_escape", b"", 415),
        ("images/variations", "application/json", b"{}", 404),
        ("models", "application/json", b"{}", 405),
    ]
    for path, kind, body, status in sent:
        request = urllib.request.Request(f"{several.url}/v1/{path}", body, {"Content-Type": kind})
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=60)
        with refused.value as answer:
            error = json.loads(answer.read())["error"]
            assert (answer.code, error["type"]) == (status, "invalid_request_error"), path
            assert error["message"] and error.keys() == {"message", "type", "param", "code"}
            assert answer.headers["x-request-id"]
    with pytest.raises(openai.BadRequestError, match="Too many files"):
        openai_client.images.edit(image=[file(photo())] * 5, **QUICK)


def test_uploads_need_no_disk(openai_client: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Large ones go to a temporary file elsewhere, for which a full disk has no room."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    large = file(Image.effect_noise((1200, 1200), 90))
    assert len(large) > 1 << 20
    answer = openai_client.images.edit(image=large, size="auto", **QUICK)
    assert opened(answer.data[0]).size == (1200, 1200)


# One model, many askers.


def test_a_full_queue_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client waits as long as it is told to, and then has its picture."""
    monkeypatch.setattr(jobs, "MOST_WAITING", 1)
    model = Gated(tiny_model())
    with serving({"tiny": model}) as running:
        held = [running.jobs.add(gated_job(model, "a fox"))]
        until(lambda: running.jobs.running)
        held.append(running.jobs.add(gated_job(model, "a fox")))
        statuses: list[int] = []

        def answered(response: Any) -> None:
            statuses.append(response.status_code)
            if len(statuses) == 2:
                model.let(100)
                until(lambda: held[1].over)

        with openai.OpenAI(
            base_url=f"{running.url}/v1",
            api_key="any",
            http_client=openai.DefaultHttpxClient(event_hooks={"response": [answered]}),
            timeout=PATIENCE,
        ) as client:
            with pytest.raises(openai.RateLimitError) as full:
                client.with_options(max_retries=0).images.generate(**QUICK)
            assert full.value.code == "rate_limit_exceeded" and full.value.type == "rate_limit_error"
            assert 1 <= int(full.value.response.headers["retry-after"]) <= 10
            assert client.images.generate(**QUICK).data
        assert statuses == [429, 429, 200]


def test_a_client_that_goes_away_frees_its_place(openai_client: Any, several: Running) -> None:
    """One that no longer waits for its answer, and one that closes its stream."""
    with pytest.raises(openai.APITimeoutError):
        openai_client.with_options(timeout=1.0).images.generate(**LONG, n=10)
    left = [several.jobs.running]
    until(lambda: not several.jobs.running)
    stream = openai_client.images.generate(**LONG, stream=True, partial_images=3)
    assert next(iter(stream)).partial_image_index == 0
    left.append(several.jobs.running)
    stream.close()
    until(lambda: not several.jobs.running)
    assert [job and job.status for job in left] == ["cancelled"] * 2


def test_a_key() -> None:
    """Who has none is told so, but for pictures' addresses, which are handed on to programs that have none."""
    with serving({"tiny": tiny_model()}, key="secret") as running:
        client = openai.OpenAI(
            base_url=f"{running.url}/v1", api_key="secret", max_retries=0, timeout=PATIENCE
        )
        with client, client.with_options(api_key="wrong") as stranger:
            for ask in (stranger.models.list, lambda: stranger.images.generate(**QUICK)):
                with pytest.raises(openai.AuthenticationError) as refused:
                    ask()
                assert refused.value.code == "invalid_api_key" and refused.value.request_id
            (item,) = client.images.generate(**QUICK, response_format="url").data
        path = item.url.removeprefix(running.url)
        assert running.get(path).picture.size == (32, 32)
        for other in ("/v1/images/files/x/0.png", "/v1/images/files/../../models"):
            assert running.get(other).status == 404
        for other in ("/v1/models", "/v1/images/files", f"/api/jobs/{path.split('/')[4]}"):
            assert running.get(other).status == 401
