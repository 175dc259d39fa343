"""Journeys: pictures and models at /v1, as OpenAI's own client asks for them."""

from __future__ import annotations

import base64
import io
import re
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from stable_diffusion.images import open_image
from tests.serve.openai_files import QUICK, file, half_erased, opened, photo, settings
from tests.serve.served import Running

openai = pytest.importorskip("openai")

PACKAGED = {"model": "icons-128", "extra_body": {"seed": 1, "steps": 2}}


# Pictures from words.


def test_a_picture_is_the_library_s(openai_client: Any, several: Running) -> None:
    """Of the model's own size, in base64, as the same settings give it anywhere."""
    answer = openai_client.images.generate(prompt="a fox", **PACKAGED)
    (expected,) = several.server.models.default.model.generate("a fox", seed=1, num_inference_steps=2)
    assert np.array_equal(opened(answer.data[0]), expected)
    assert (answer.size, answer.output_format, answer.background) == ("128x128", "png", "opaque")
    assert answer.data[0].url is None and abs(answer.created - time.time()) < 60
    assert settings(answer.data[0]) == expected.info["settings"]


def test_several_pictures_have_seeds_in_a_row(openai_client: Any) -> None:
    """Each is the one that its seed gives alone, and says its seed."""
    three = openai_client.images.generate(**QUICK, n=3, extra_body={"seed": 5}).data
    (alone,) = openai_client.images.generate(**QUICK, extra_body={"seed": 7}).data
    assert [item.seed for item in three] == [5, 6, 7] == [settings(item)["seed"] for item in three]
    assert three[2].b64_json == alone.b64_json != three[1].b64_json


@pytest.mark.parametrize(
    ("size", "file_size"), [("256x192", (256, 192)), ("auto", (128, 128)), (None, (128, 128))]
)
def test_size_is_the_size_of_the_file(
    openai_client: Any, size: str | None, file_size: tuple[int, int]
) -> None:
    """The model draws at about its own area in that shape, which the settings keep."""
    asked = {"model": "icons-128", "extra_body": {"seed": 1, "steps": 1}}
    answer = openai_client.images.generate(prompt="a fox", size=size, **asked)
    assert opened(answer.data[0]).size == file_size and answer.size == "x".join(map(str, file_size))
    made = settings(answer.data[0])
    width, height = made["width"], made["height"]
    assert abs(width / height - file_size[0] / file_size[1]) < 0.1 and 0.8 < width * height / 128**2 < 1.25


def test_jpeg_and_webp(openai_client: Any) -> None:
    sizes, more = [], {"size": "256x256", "extra_body": {"seed": 1}}
    for format, quality in (("jpeg", 90), ("jpeg", 5), ("jpeg", 0), ("webp", 90), ("webp", 5)):
        answer = openai_client.images.generate(
            **QUICK, output_format=format, output_compression=quality, **more
        )
        picture = opened(answer.data[0])
        assert (picture.format, answer.output_format, picture.size) == (format.upper(), format, (256, 256))
        sizes.append(len(answer.data[0].b64_json))
    assert sizes[0] > 2 * max(sizes[1:3]) and sizes[3] > sizes[4]


def test_addresses_are_absolute_and_need_nothing_else(openai_client: Any, several: Running) -> None:
    asked = {**QUICK, "n": 2, "extra_body": {"seed": 3}}
    items = openai_client.images.generate(**asked, response_format="url").data
    encoded = openai_client.images.generate(**asked).data
    for item, other in zip(items, encoded, strict=True):
        assert item.url.startswith(f"{several.url}/v1/images/files/") and item.b64_json is None
        with urllib.request.urlopen(item.url, timeout=60) as answer:
            assert answer.headers["content-type"] == "image/png"
            assert answer.headers["cross-origin-resource-policy"] == "cross-origin"
            assert answer.read() == base64.b64decode(other.b64_json)
    small = openai_client.images.generate(
        **asked, response_format="url", output_format="jpeg", output_compression=7
    )
    with urllib.request.urlopen(small.data[1].url, timeout=60) as answer:
        assert answer.headers["content-type"] == "image/jpeg" and answer.read(2) == b"\xff\xd8"
    first = items[0].url
    for gone in ("0.gif", "2.png", "0.jpeg?quality=101", "-1.png", "0.png/../1.png"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(first.replace("0.png", gone), timeout=60)


@pytest.mark.parametrize("name", ["gpt-image-1", "dall-e-3", "", "../../etc/passwd"])
def test_any_model_name_draws(openai_client: Any, name: str) -> None:
    """With the first model, since many programs have a name built in."""
    answer = openai_client.images.generate(prompt="a fox", model=name, extra_body={"steps": 1})
    assert answer.size == "128x128", "and the others' are smaller"


def test_extras_and_fields_without_a_meaning(openai_client: Any) -> None:
    """Fields of ``Request`` are honoured, upstream's own are accepted, others are named in a header."""
    extras = {"steps": 3, "guidance_scale": 2.5, "negative_prompt": "blue", "sampler": "DDIM", "eta": 0.5}
    more = {"num_inference_steps": None, "spacing": "linspace", "walk": 1, "a\r\nb: ü": 2, "width": 8, "": 3}
    answer = openai_client.images.with_raw_response.generate(
        **QUICK, user="me", quality="hd", style="vivid", moderation="low", extra_body={**extras, **more}
    )
    made = settings(answer.parse().data[0])
    assert (made["num_inference_steps"], made["guidance_scale"], made["negative_prompt"]) == (3, 2.5, "blue")
    assert (made["sampler"].lower(), made["eta"], made["spacing"]) == ("ddim", 0.5, "linspace")
    assert answer.headers["x-minisd-ignored"] == "walk, a??b???, width, ?"


def test_notes_are_told(openai_client: Any) -> None:
    """Words that the model does not read, and those that mean something to other programs: a prompt is plain text."""
    answer = openai_client.images.generate(model="tiny", prompt="a fox " * 30)
    assert "left out" in answer.notes[0]
    answer = openai_client.images.generate(model="tiny", prompt="a (fox:1.3)")
    assert "text like any other" in answer.notes[0]
    weighted = {"prompt": "a (fox:1.3)", "model": "tiny", "extra_body": {"prompt_syntax": "a1111"}}
    assert not hasattr(openai_client.images.generate(**weighted), "notes")


def test_a_second_pass_enlarges(openai_client: Any) -> None:
    answer = openai_client.images.generate(**QUICK, size="40x24", extra_body={"hires": 2})
    assert answer.size == "80x48" and opened(answer.data[0]).size == (80, 48)


def test_opacity(openai_client: Any) -> None:
    """A model whose pictures have opacity gives it, unless it is asked not to, or the format has none."""
    asked = {"model": "owner/fine", "prompt": "a fox"}
    cases = [({}, "RGBA"), ({"background": "transparent"}, "RGBA"), ({"background": "opaque"}, "RGB")]
    for more, mode in [*cases, ({"output_format": "jpeg"}, "RGB")]:
        answer = openai_client.images.generate(**asked, **more)
        picture = opened(answer.data[0])
        assert picture.mode == mode and (picture.format == "JPEG" or "minisd" in picture.text)
        assert answer.background == ("transparent" if mode == "RGBA" else "opaque")


def test_the_words_of_the_documentation(
    packaged: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its example, as it stands there."""
    text = (Path(__file__).parents[2] / "docs/serving.md").read_text(encoding="utf-8")
    (code,) = (code for code in re.findall(r"```python\n(.*?)```", text, re.S) if "OpenAI(" in code)
    monkeypatch.chdir(tmp_path)
    exec(code.replace("http://127.0.0.1:7860", packaged.url), {})
    sizes = {path.name: open_image(path).size for path in tmp_path.iterdir()}
    assert sizes == {"fox-1.png": (256, 256), "fox-2.png": (256, 256)}


# Edits.


def test_an_image_in_every_form(openai_client: Any) -> None:
    """An open file, a list, bare bytes, a name that lies, and the formats that upstream takes."""
    asked = {**QUICK, "extra_body": {"seed": 1, "strength": 0.5}}
    content = file(photo())
    named = io.BytesIO(content)
    named.name = "photo.txt"
    forms = [named, [content], content, ("a.jpg", content), ("../../x.png", io.BytesIO(content), "image/gif")]
    made = [openai_client.images.edit(image=form, **asked).data[0] for form in forms]
    assert len({item.b64_json for item in made}) == 1 and opened(made[0]).size == (128, 128)
    assert settings(made[0])["strength"] == 0.5 and settings(made[0])["seed"] == 1
    for format in ("JPEG", "WEBP"):
        assert openai_client.images.edit(image=file(photo(), format), **asked).data


def test_the_transparent_half_is_repainted(openai_client: Any) -> None:
    """Bytes outside of it are the image's, though the mask is white there; inside it all is new."""
    answer = openai_client.images.edit(
        prompt="a tree", image=file(photo()), mask=file(half_erased()), **PACKAGED
    )
    made, before = np.asarray(opened(answer.data[0]), int), np.asarray(photo(), int)
    assert np.array_equal(made[:, :64], before[:, :64])
    assert (np.abs(made[:, 64:] - before[:, 64:]).max(axis=-1) > 10).mean() > 0.9
    assert settings(answer.data[0])["strength"] == 1


@pytest.mark.parametrize("mode", ["RGB", "L", "1"])
def test_white_is_repainted_in_a_mask_without_alpha(openai_client: Any, mode: str) -> None:
    mask = Image.new("RGB", photo().size)
    ImageDraw.Draw(mask).rectangle((0, 64, 127, 127), fill="white")
    answer = openai_client.images.edit(image=file(photo()), mask=file(mask.convert(mode)), **QUICK)
    made, before = np.asarray(opened(answer.data[0])), np.asarray(photo())
    assert np.array_equal(made[:64], before[:64]) and not np.array_equal(made[64:], before[64:])


def test_a_mask_at_another_size(openai_client: Any) -> None:
    """Where the picture is drawn smaller than the file, the bytes outside the mask are the image's all the same."""
    large = photo().resize((300, 200))
    answer = openai_client.images.edit(image=file(large), mask=file(half_erased((150, 100))), **QUICK)
    made, before = np.asarray(opened(answer.data[0])), np.asarray(large)
    assert made.shape == before.shape and np.array_equal(made[:, :148], before[:, :148])
    assert not np.array_equal(made[:, 152:], before[:, 152:])
    answer = openai_client.images.edit(
        image=file(large), mask=file(half_erased((150, 100))), size="90x60", **QUICK
    )
    assert opened(answer.data[0]).size == (90, 60)


def test_an_edit_without_a_mask_keeps_its_size(openai_client: Any) -> None:
    answer = openai_client.images.edit(image=file(photo().resize((100, 60))), n=2, **QUICK)
    assert [opened(item).size for item in answer.data] == [(100, 60)] * 2
    assert settings(answer.data[0])["strength"] == 0.8


# Models.


def test_models(openai_client: Any) -> None:
    listed = openai_client.models.list().data
    assert [each.id for each in listed] == ["icons-128", "tiny", "owner/fine"]
    assert openai_client.models.retrieve("owner/fine") == listed[2] and listed[2].owned_by == "minisd"
    with pytest.raises(openai.NotFoundError, match="choose one of icons-128, owner/fine, tiny") as missing:
        openai_client.models.retrieve("gpt-image-1")
    assert missing.value.param == "model" and missing.value.code == "not_found"
