"""Journeys: the OpenAI surface, as OpenAI's own client meets it."""

from __future__ import annotations

import base64
import io
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw
from tiny import FINE, TINY, tiny_model

from stable_diffusion.model import DiffusionModel
from stable_diffusion.serve import jobs
from stable_diffusion.serve.door import Models, Served
from stable_diffusion.serve.jobs import Job, Jobs
from stable_diffusion.serve.replies import Server

from .temporary import running

openai = pytest.importorskip("openai")

PACKAGED = {"model": "icons-128", "extra_body": {"seed": 1, "steps": 2}}
QUICK = {"model": "tiny", "prompt": "a fox"}
LONG = {"model": "icons-128", "prompt": "a fox", "extra_body": {"steps": 60}}
"""Some seconds, unless it is cancelled."""


@pytest.fixture(scope="module")
def model() -> DiffusionModel:
    return DiffusionModel.from_pretrained()


@pytest.fixture(scope="module")
def server(model: DiffusionModel) -> Server:
    tiny, fine = tiny_model(TINY), tiny_model(FINE)
    named = {"icons-128": model, "tiny": tiny, "owner/fine": fine}
    served = [Served(name=name, model=each, created=1_790_000_000) for name, each in named.items()]
    return Server(models=Models(served), jobs=Jobs())


@pytest.fixture(scope="module")
def address(server: Server) -> Iterator[str]:
    with running(server) as url:
        yield url


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0, timeout=120) as client:
        yield client


@pytest.fixture
def photo() -> Image.Image:
    """A picture of the packaged model's size."""
    ramp = np.add.outer(np.arange(128), np.arange(128)).astype(np.uint8)
    return Image.fromarray(np.dstack([ramp, 255 - ramp, np.full_like(ramp, 90)]))


def file(picture: Image.Image, format: str = "PNG") -> bytes:
    content = io.BytesIO()
    picture.save(content, format=format)
    return content.getvalue()


def opened(item: Any) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(item.b64_json)))


def settings(item: Any) -> dict[str, Any]:
    return json.loads(opened(item).text["minisd"])


def half_erased(size: tuple[int, int] = (128, 128)) -> Image.Image:
    """A mask whose right half is transparent, and whose opaque half is as light as white: the colour says nothing."""
    mask = Image.new("RGBA", size, "white")
    mask.paste((255, 255, 255, 0), (size[0] // 2, 0, *size))
    return mask


def is_idle(server: Server, seconds: float = 20.0) -> bool:
    """Whether the server draws nothing, and nothing waits, within so many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if server.jobs.running is None and not server.jobs.waiting:
            return True
        time.sleep(0.02)
    return False


# Pictures from words.


def test_a_picture_is_the_library_s(client: Any, model: DiffusionModel) -> None:
    """Of the model's own size, in base64, as the same settings give it anywhere."""
    answer = client.images.generate(prompt="a fox", **PACKAGED)
    (expected,) = model.generate("a fox", seed=1, num_inference_steps=2)
    assert np.array_equal(opened(answer.data[0]), expected)
    assert (answer.size, answer.output_format, answer.background) == ("128x128", "png", "opaque")
    assert answer.data[0].url is None and abs(answer.created - time.time()) < 60
    assert settings(answer.data[0]) == expected.info["settings"]


def test_several_pictures_have_seeds_in_a_row(client: Any) -> None:
    """Each is the one that its seed gives alone, and says its seed."""
    three = client.images.generate(**QUICK, n=3, extra_body={"seed": 5}).data
    (alone,) = client.images.generate(**QUICK, extra_body={"seed": 7}).data
    assert [item.seed for item in three] == [5, 6, 7] == [settings(item)["seed"] for item in three]
    assert three[2].b64_json == alone.b64_json != three[1].b64_json


@pytest.mark.parametrize(
    ("size", "file_size"), [("256x192", (256, 192)), ("auto", (128, 128)), (None, (128, 128))]
)
def test_size_is_the_size_of_the_file(client: Any, size: str | None, file_size: tuple[int, int]) -> None:
    """The model draws at about its own area in that shape, which the settings keep."""
    asked = {"model": "icons-128", "extra_body": {"seed": 1, "steps": 1}}
    answer = client.images.generate(prompt="a fox", size=size, **asked)
    assert opened(answer.data[0]).size == file_size and answer.size == "x".join(map(str, file_size))
    made = settings(answer.data[0])
    width, height = made["width"], made["height"]
    assert abs(width / height - file_size[0] / file_size[1]) < 0.1 and 0.8 < width * height / 128**2 < 1.25


def test_jpeg_and_webp(client: Any) -> None:
    sizes, more = [], {"size": "256x256", "extra_body": {"seed": 1}}
    for format, quality in (("jpeg", 90), ("jpeg", 5), ("jpeg", 0), ("webp", 90), ("webp", 5)):
        answer = client.images.generate(**QUICK, output_format=format, output_compression=quality, **more)
        picture = opened(answer.data[0])
        assert (picture.format, answer.output_format, picture.size) == (format.upper(), format, (256, 256))
        sizes.append(len(answer.data[0].b64_json))
    assert sizes[0] > 2 * max(sizes[1:3]) and sizes[3] > sizes[4]


def test_addresses_are_absolute_and_need_nothing_else(client: Any, address: str) -> None:
    asked = {**QUICK, "n": 2, "extra_body": {"seed": 3}}
    items = client.images.generate(**asked, response_format="url").data
    encoded = client.images.generate(**asked).data
    for item, other in zip(items, encoded, strict=True):
        assert item.url.startswith(f"{address}/v1/images/files/") and item.b64_json is None
        with urllib.request.urlopen(item.url, timeout=60) as answer:
            assert answer.headers["content-type"] == "image/png"
            assert answer.read() == base64.b64decode(other.b64_json)
    small = client.images.generate(**asked, response_format="url", output_format="jpeg", output_compression=7)
    with urllib.request.urlopen(small.data[1].url, timeout=60) as answer:
        assert answer.headers["content-type"] == "image/jpeg" and answer.read(2) == b"\xff\xd8"
    first = items[0].url
    for gone in ("0.gif", "2.png", "0.jpeg?quality=101", "-1.png", "0.png/../1.png"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(first.replace("0.png", gone), timeout=60)


@pytest.mark.parametrize("name", ["gpt-image-1", "dall-e-3", "", "../../etc/passwd"])
def test_any_model_name_draws(client: Any, name: str) -> None:
    """With the first model, since many programs have a name built in."""
    answer = client.images.generate(prompt="a fox", model=name, extra_body={"steps": 1})
    assert answer.size == "128x128", "and the others' are smaller"


def test_extras_and_fields_without_a_meaning(client: Any) -> None:
    """Fields of ``Request`` are honoured, upstream's own are accepted, others are named in a header."""
    extras = {"steps": 3, "guidance_scale": 2.5, "negative_prompt": "blue", "sampler": "DDIM", "eta": 0.5}
    more = {"num_inference_steps": None, "spacing": "linspace", "walk": 1, "a\r\nb: ü": 2, "width": 8}
    answer = client.images.with_raw_response.generate(
        **QUICK, user="me", quality="hd", style="vivid", moderation="low", extra_body={**extras, **more}
    )
    made = settings(answer.parse().data[0])
    assert (made["num_inference_steps"], made["guidance_scale"], made["negative_prompt"]) == (3, 2.5, "blue")
    assert (made["sampler"].lower(), made["eta"], made["spacing"]) == ("ddim", 0.5, "linspace")
    assert answer.headers["x-minisd-ignored"] == "walk, a??b???, width"


def test_notes_are_told(client: Any) -> None:
    """Words that the model does not read are named beside the picture."""
    answer = client.images.generate(model="tiny", prompt="a fox " * 30)
    assert "left out" in answer.notes[0]


def test_opacity(client: Any) -> None:
    """A model whose pictures have opacity gives it, unless it is asked not to, or the format has none."""
    asked = {"model": "owner/fine", "prompt": "a fox"}
    cases = [({}, "RGBA"), ({"background": "transparent"}, "RGBA"), ({"background": "opaque"}, "RGB")]
    for more, mode in [*cases, ({"output_format": "jpeg"}, "RGB")]:
        answer = client.images.generate(**asked, **more)
        picture = opened(answer.data[0])
        assert picture.mode == mode and (picture.format == "JPEG" or "minisd" in picture.text)
        assert answer.background == ("transparent" if mode == "RGBA" else "opaque")


# Edits.


def test_an_image_in_every_form(client: Any, photo: Image.Image) -> None:
    """An open file, a list, bare bytes, a name that lies, and the formats that upstream takes."""
    asked = {**QUICK, "extra_body": {"seed": 1, "strength": 0.5}}
    content = file(photo)
    named = io.BytesIO(content)
    named.name = "photo.txt"
    forms = [named, [content], content, ("a.jpg", content), ("../../x.png", io.BytesIO(content), "image/gif")]
    made = [client.images.edit(image=form, **asked).data[0] for form in forms]
    assert len({item.b64_json for item in made}) == 1 and opened(made[0]).size == (128, 128)
    assert settings(made[0])["strength"] == 0.5 and settings(made[0])["seed"] == 1
    for format in ("JPEG", "WEBP"):
        assert client.images.edit(image=file(photo, format), **asked).data


def test_the_transparent_half_is_repainted(client: Any, photo: Image.Image) -> None:
    """Bytes outside of it are the image's, though the mask is white there; inside it all is new."""
    answer = client.images.edit(prompt="a tree", image=file(photo), mask=file(half_erased()), **PACKAGED)
    made, before = np.asarray(opened(answer.data[0]), int), np.asarray(photo, int)
    assert np.array_equal(made[:, :64], before[:, :64])
    assert (np.abs(made[:, 64:] - before[:, 64:]).max(axis=-1) > 10).mean() > 0.9
    assert settings(answer.data[0])["strength"] == 1


@pytest.mark.parametrize("mode", ["RGB", "L", "1"])
def test_white_is_repainted_in_a_mask_without_alpha(client: Any, photo: Image.Image, mode: str) -> None:
    mask = Image.new("RGB", photo.size)
    ImageDraw.Draw(mask).rectangle((0, 64, 127, 127), fill="white")
    answer = client.images.edit(image=file(photo), mask=file(mask.convert(mode)), **QUICK)
    made, before = np.asarray(opened(answer.data[0])), np.asarray(photo)
    assert np.array_equal(made[:64], before[:64]) and not np.array_equal(made[64:], before[64:])


def test_a_mask_at_another_size(client: Any, photo: Image.Image) -> None:
    """Where the picture is drawn smaller than the file, the bytes outside the mask are the image's all the same."""
    large = photo.resize((300, 200))
    answer = client.images.edit(image=file(large), mask=file(half_erased((150, 100))), **QUICK)
    made, before = np.asarray(opened(answer.data[0])), np.asarray(large)
    assert made.shape == before.shape and np.array_equal(made[:, :148], before[:, :148])
    assert not np.array_equal(made[:, 152:], before[:, 152:])
    answer = client.images.edit(image=file(large), mask=file(half_erased((150, 100))), size="90x60", **QUICK)
    assert opened(answer.data[0]).size == (90, 60)


def test_an_edit_without_a_mask_keeps_its_size(client: Any, photo: Image.Image) -> None:
    answer = client.images.edit(image=file(photo.resize((100, 60))), n=2, **QUICK)
    assert [opened(item).size for item in answer.data] == [(100, 60)] * 2
    assert settings(answer.data[0])["strength"] == 0.8


# Streams.


def test_a_stream_of_partial_images(client: Any) -> None:
    """They come before the picture, which is the one without a stream, in files of its size."""
    asked = {
        "prompt": "a fox",
        "model": "icons-128",
        "extra_body": {"seed": 1, "steps": 4},
        "size": "160x160",
    }
    *partial, last = client.images.generate(**asked, stream=True, partial_images=3)
    assert {event.type for event in partial} == {"image_generation.partial_image"}
    assert 1 <= len(partial) <= 3 and [event.partial_image_index for event in partial] == [
        *range(len(partial))
    ]
    assert last.type == "image_generation.completed" and last.usage.total_tokens == 0
    assert last.b64_json == client.images.generate(**asked).data[0].b64_json != partial[-1].b64_json
    for event in (*partial, last):
        assert opened(event).size == (160, 160) and abs(event.created_at - time.time()) < 60
        assert (event.size, event.output_format, event.background) == ("160x160", "png", "opaque")


@pytest.mark.parametrize("count", [None, 0, 1, 2])
def test_a_stream_has_no_more_than_was_asked_for(client: Any, photo: Image.Image, count: int | None) -> None:
    """Of an edit too, in its own words."""
    more = {} if count is None else {"partial_images": count}
    asked = {"image": file(photo), "output_format": "webp", **QUICK}
    *partial, last = client.images.edit(**asked, **more, stream=True)
    assert len(partial) <= (count or 0) and {event.type for event in partial} <= {"image_edit.partial_image"}
    assert last.type == "image_edit.completed" and opened(last).format == "WEBP" and last.seed >= 0


def test_an_error_in_a_stream(client: Any, photo: Image.Image) -> None:
    """What shows only while it draws is an error there; without a stream it has its status."""
    mask = Image.new("RGBA", photo.size, "white")
    mask.putpixel((1, 1), (0, 0, 0, 0))
    asked = {"image": file(photo), "mask": file(mask), "prompt": "a fox", "model": "icons-128"}
    with pytest.raises(openai.APIError, match="lies between the latents") as streamed:
        list(client.images.edit(**asked, stream=True))
    assert streamed.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError, match="lies between the latents"):
        client.images.edit(**asked)


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
    ({"extra_body": {"sampler": "best"}}, "sampler"),
    ({"extra_body": {"strength": 0}}, "strength"),
    ({"extra_body": {"negative_prompt": 7}}, "negative_prompt"),
    ({"extra_body": {"lora": {"x": 1}}}, "lora"),
]


@pytest.mark.parametrize(("fields", "param"), REFUSED, ids=lambda value: json.dumps(value)[:40])
def test_what_is_refused(client: Any, fields: dict[str, Any], param: str) -> None:
    """With a sentence that names the field, as the client calls it."""
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.generate(**{**QUICK, **fields})
    error = refused.value
    assert error.param == param and param in error.body["message"].lower(), error
    assert error.type == "invalid_request_error" and error.request_id.startswith("req_")


def test_edits_that_are_refused(client: Any, photo: Image.Image) -> None:
    content = file(photo)
    bomb = file(Image.new("1", (5_000, 5_000)))
    cases = [
        ({"image": [content, content]}, "image"),
        ({"image": []}, "image"),
        ({"image": b"no picture"}, "image"),
        ({"image": bomb}, "image"),
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
            client.images.edit(**QUICK, **fields)
        error = refused.value
        assert error.param == param and param in error.body["message"].lower(), error
        assert error.request_id.startswith("req_")


def test_bodies_that_are_not_what_they_should_be(client: Any, photo: Image.Image, address: str) -> None:
    sent = [
        ("images/generations", "text/plain", b"{}", 415),
        ("images/generations", "application/json", b"[1]", 400),
        ("images/generations", "application/json", b"{", 400),
        ("images/edits", "application/json", b'{"prompt": "a fox"}', 415),
        ("images/edits", "multipart/form-data", b"", 400),
        ("images/edits", "multipart/form-data; boundary=x", b"--y\r\nfoo", 400),
        ("images/variations", "application/json", b"{}", 404),
        ("models", "application/json", b"{}", 405),
    ]
    for path, kind, body, status in sent:
        request = urllib.request.Request(f"{address}/v1/{path}", body, {"Content-Type": kind})
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=60)
        with refused.value as answer:
            error = json.loads(answer.read())["error"]
            assert (answer.code, error["type"]) == (status, "invalid_request_error"), path
            assert error["message"] and error.keys() == {"message", "type", "param", "code"}
            assert answer.headers["x-request-id"]
    with pytest.raises(openai.BadRequestError, match="Too many files"):
        client.images.edit(image=[file(photo)] * 5, **QUICK)


# Models.


def test_models(client: Any) -> None:
    listed = client.models.list().data
    assert [each.id for each in listed] == ["icons-128", "tiny", "owner/fine"]
    assert client.models.retrieve("owner/fine") == listed[2] and listed[2].owned_by == "minisd"
    with pytest.raises(openai.NotFoundError, match="choose one of icons-128, owner/fine, tiny") as missing:
        client.models.retrieve("gpt-image-1")
    assert missing.value.param == "model" and missing.value.code == "not_found"


# One model, many askers.


def long_job(server: Server) -> Job:
    served = server.models.named("icons-128")
    return server.jobs.add(
        Job(model=served.model, request=served.model.request("a fox", num_inference_steps=150))
    )


def test_a_full_queue_is_asked_again(client: Any, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client waits as long as it is told to, and then has its picture."""
    monkeypatch.setattr(jobs, "MOST_WAITING", 1)
    held = [long_job(server)]
    while server.jobs.running is None:
        time.sleep(0.01)
    held.append(long_job(server))
    with pytest.raises(openai.RateLimitError) as full:
        client.images.generate(**QUICK)
    assert (
        1 <= int(full.value.response.headers["retry-after"]) < 60 and full.value.code == "rate_limit_exceeded"
    )
    answers: list[int] = []

    def answered(response: Any) -> None:
        answers.append(response.status_code)
        for job in held:
            server.jobs.cancel(job)

    with openai.DefaultHttpxClient(event_hooks={"response": [answered]}) as http:
        again = client.with_options(http_client=http, max_retries=2)
        assert again.images.generate(**QUICK).data
    assert answers == [429, 200] and is_idle(server)


def test_a_client_that_goes_away_frees_its_place(client: Any, server: Server) -> None:
    """One that no longer waits for its answer, and one that closes its stream."""
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=1.0).images.generate(**LONG, n=10)
    left = [server.jobs.running]
    assert is_idle(server)
    stream = client.images.generate(**LONG, stream=True, partial_images=3)
    assert next(iter(stream)).partial_image_index == 0
    left.append(server.jobs.running)
    stream.close()
    assert is_idle(server) and [job and job.status for job in left] == ["cancelled"] * 2
