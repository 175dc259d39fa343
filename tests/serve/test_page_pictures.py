"""Journeys over the page with pictures that people bring: settings in files, pictures to begin from, masks."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tests.checkpoints.test_lora import kohya, written
from tests.serve.browsing import Desk, chromium, desk
from tests.serve.served import Running, serving
from tests.tiny import TINY, tiny_model

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as steered:
        yield steered


def png(size: tuple[int, int] = (96, 64), texts: dict[str, str] | None = None, seed: int = 0) -> bytes:
    """A picture of noise in soft blocks."""
    noise = np.random.default_rng(seed).integers(0, 255, (4, 6, 3), dtype=np.uint8)
    content, chunks = io.BytesIO(), PngInfo()
    for key, text in (texts or {}).items():
        chunks.add_text(key, text)
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(content, format="PNG", pnginfo=chunks)
    return content.getvalue()


def opened(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content))


def with_texts(content: bytes, **texts: str) -> bytes:
    """The same pixels with other texts."""
    chunks, result = PngInfo(), io.BytesIO()
    for key, text in texts.items():
        chunks.add_text(key, text)
    opened(content).save(result, format="PNG", pnginfo=chunks)
    return result.getvalue()


@pytest.mark.parametrize("way", ["drop", "paste", "choose"])
def test_bringing_a_picture_is_the_same_in_every_way(browser: Any, tiny: Running, way: str) -> None:
    with desk(browser, tiny) as page:
        page.bring(way, png())
        page["#startImage"].wait_for()
        assert page.file("m.state.desk.image") == png()
        page["#prompt"].fill("a circle")
        page["#sheet img[alt='a circle']"].wait_for()
        assert page["#sheet img"].evaluate("(image) => [image.naturalWidth, image.naturalHeight]") == [96, 64]
        page.open()
        page["#startImage"].wait_for()
        assert page.file("m.state.desk.image") == png()
        page.bring(way, b"no picture", "text.txt", "text/plain")
        page["#line.error #status:text('cannot be read as a picture')"].wait_for()


@pytest.mark.parametrize("texts", ["minisd", "parameters"])
def test_a_dropped_picture_brings_its_settings_back(browser: Any, tiny: Running, texts: str) -> None:
    """Drawing again gives the same bytes: of ours, and of what other programs write."""
    ours = texts == "minisd"
    with desk(browser, tiny) as page:
        page["#live"].uncheck()
        page["summary"].click()
        page["#prompt"].fill("a (circle), of 3 colours")
        page["[data-field=negative_prompt]"].fill("grey")
        page["#seed"].fill("9223372036854775807" if ours else "77")
        page["#steps"].fill("3")
        page["#guidance"].fill("3.5")
        if ours:
            page["#sampler"].select_option("ddim")
            page["[data-field=eta]"].fill("0.5")
            page["#width"].fill("50")
            page["[data-field=prompt_syntax]"].select_option("plain")
        (content,) = page.draw()
    assert opened(content).size == ((50, 32) if ours else (32, 32))
    if not ours:
        content = with_texts(content, parameters=opened(content).info["parameters"])
    with desk(browser, tiny) as page:
        page["#live"].uncheck()
        page.bring("drop", content)
        page["#status:text('settings of picture.png')"].wait_for()
        assert page["#lock"].get_attribute("aria-pressed") == "true"
        assert page["#sheet img"].get_attribute("alt") == "a (circle), of 3 colours"
        (again,) = page.draw()
    assert opened(again).tobytes() == opened(content).tobytes()
    if ours:
        assert again == content
    else:
        assert opened(again).info["parameters"] == opened(content).info["parameters"]


def test_a_strangers_settings_are_data(browser: Any, tiny: Running) -> None:
    """What names a file, a model or a LoRA that is not served is left out; no request says a word of it."""
    files = {
        "image": "/etc/passwd",
        "mask_image": "/etc/hosts",
        "vae": "/etc/vae",
        "embedding": ["/etc/word"],
    }
    hostile = {
        **{"prompt": "a circle", "seed": 3, "num_inference_steps": 2, "strength": 0.5, **files},
        **{
            "lora": {"/etc/lora": 1.0},
            "model": "/etc/model",
            "text_encoder": "/etc/text",
            "constructor": {"a": 1},
        },
    }
    with desk(browser, tiny) as page:
        sent: list[str] = []
        page.page.on("request", lambda request: sent.append(request.post_data or ""))
        page.bring("drop", png((32, 32), {"minisd": json.dumps(hostile)}))
        page["#status:text('started from another picture')"].wait_for()
        page.draw()
        assert any('"num_inference_steps":2' in body for body in sent)
        assert not any("/etc/" in body or "constructor" in body for body in sent)


def test_what_other_programs_write_is_read(browser: Any, tiny: Running) -> None:
    """AUTOMATIC1111's text, of its old versions and of its new ones, pasted as text too."""
    text = (
        "a cat, (soft:1.2)\nsecond line <lora:none:0.5>\nNegative prompt: dog,\nbird\nSteps: 20, "
        "Sampler: DPM++ 2M Karras, "
        'CFG scale: 7.5, Seed: 12345678901, Size: 512x768, Model hash: ab12, Model: x, Lora hashes: "none: ab, c: d", '
        "Version: v1.6.0"
    )
    with desk(browser, tiny) as page:
        page["#live"].uncheck()
        page.page.evaluate(
            """(text) => {
                const clipboardData = new DataTransfer();
                clipboardData.setData("text", text);
                const how = { bubbles: true, cancelable: true, clipboardData };
                document.getElementById("prompt").dispatchEvent(new ClipboardEvent("paste", how));
            }""",
            text,
        )
        page["#status:text('LoRA none')"].wait_for()
        fields = page.run("m.state.desk.fields")
        words = {"prompt": "a cat, (soft:1.2)\nsecond line", "negative_prompt": "dog,\nbird"}
        assert fields == {
            **{**words, "prompt_syntax": "a1111", "seed": "12345678901", "width": 512, "height": 768},
            **{"num_inference_steps": 20, "sampler": "dpmpp_2m", "spacing": "karras", "guidance_scale": 7.5},
        }
        text = "a\\nSteps: 4, Sampler: PLMS, Schedule type: SGM Uniform, CFG scale: 2, Seed: 1"
        said = page.run(f"m.restore.ofText('{text}').settings")
        assert (said["sampler"], said["spacing"]) == ("pndm", "sgm_uniform")
        text = "a\nSteps: 4, Schedule type: Simple, Sampler: Euler, Seed: 1, Denoising strength: 0.6, Hires upscale: 2"
        said = page.run("m.restore.ofText(v[0]).settings", text)
        assert (said["spacing"], said["hires"], said["hires_strength"]) == ("trailing", 2, 0.6)
        assert "strength" not in said


def test_a_picture_chooses_the_model_that_made_it(browser: Any) -> None:
    """By its name, and by a path on the machine that made it."""
    with (
        serving({"first": tiny_model(), "mine": tiny_model(seed=1)}) as running,
        desk(browser, running) as page,
    ):
        for made in ("mine", "/runs/mine/model", "C:\\models\\mine.safetensors"):
            page.run("m.state.change({ model: 'first' })")
            settings = {"prompt": "a circle", "seed": 3, "model": made}
            assert (
                page.run("m.restore.restore({ settings: v[0], kind: 'minisd', unknown: [] })", settings) == []
            )
            assert page.run("m.state.desk.model") == "mine"


def test_a_variation_without_its_seed(browser: Any, tiny: Running) -> None:
    """Takes any; and what a picture brought of the prompt's syntax goes with the model's own settings."""
    with desk(browser, tiny) as page:
        page["#live"].uncheck()
        fields = {"prompt": "a circle", "variation_strength": 0.5, "prompt_syntax": "plain"}
        page.run("m.state.change({ fields: v[0] })", fields)
        page.draw()
        (kept,) = page.run("await m.store.keptPictures()")
        assert kept["settings"]["variation_seed"] >= 0
        page["summary"].click()
        page["#reset"].click()
        assert page.run("Object.keys(m.state.desk.fields).sort()") == ["prompt", "seed"]


def test_models_and_loras_are_chosen(browser: Any, tmp_path: Path) -> None:
    """Another model brings its own settings; a LoRA's slider says how much it acts, and a picture brings that back."""
    model = tiny_model()
    model.load_lora(written(kohya(model), tmp_path / "style.safetensors"), 0.5)
    other = tiny_model(replace(TINY, num_inference_steps=2, prompts=("a boat",)), seed=1)
    with serving({"first": model, "second": other}) as running, desk(browser, running) as page:
        page["#live"].uncheck()
        page["summary"].click()
        page["#prompt"].fill("a circle")
        assert page["#lora-style"].input_value() == "0.5"
        page["#lora-style"].fill("-0.25")
        (content,) = page.draw()
        assert json.loads(opened(content).info["minisd"])["lora"] == {"style": -0.25}
        page["#model"].select_option("second")
        page["#loraField"].wait_for(state="hidden")
        assert (
            page["#steps"].input_value() == "2" and page["#prompt"].get_attribute("placeholder") == "a boat"
        )
        (second,) = page.draw()
        assert "lora" not in json.loads(opened(second).info["minisd"])
        assert opened(second).tobytes() != opened(content).tobytes()
        page["#kept [role=option]"].nth(1).click()
        page["[data-act=settings]"].click()
        assert page["#model"].input_value() == "first" and page["#lora-style"].input_value() == "-0.25"
        (again,) = page.draw()
        assert again == content


def layer(page: Desk) -> Any:
    """What is painted, as booleans."""
    script = (
        "(({ width, height }, canvas) => [width, height, Array.from(canvas.getContext('2d')"
        ".getImageData(0, 0, width, height).data.filter((_, at) => at % 4 === 3))])"
        "(document.getElementById('layer'), document.getElementById('layer'))"
    )
    width, height, opacity = page.run(script)
    return np.array(opacity).reshape(height, width) > 127


def begun(page: Desk) -> dict[str, float]:
    """Opens the painter on a picture, and gives the layer's place."""
    page["#live"].uncheck()
    page.bring("drop", png((192, 128)))
    page["#paint"].click()
    page["#masking"].wait_for()
    page["#brushSize"].fill("10")
    box: dict[str, float] = page["#layer"].bounding_box()
    return box


@pytest.mark.parametrize(("width", "zoom"), [(360, 2.0), (1280, 1.0), (640, 2.0), (1600, 0.5)])
def test_a_mask_is_painted_where_the_pointer_is(browser: Any, tiny: Running, width: int, zoom: float) -> None:
    """At every zoom; what is not painted keeps its bytes."""
    with desk(browser, tiny, width, round(800 / zoom), device_scale_factor=zoom) as page:
        box = begun(page)
        mouse = page.page.mouse
        mouse.move(box["x"] + 0.25 * box["width"], box["y"] + 0.5 * box["height"])
        mouse.down()
        mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 0.5 * box["height"], steps=4)
        mouse.up()
        rows, columns = np.nonzero(layer(page))
        assert abs(rows.mean() - 64) < 2 and abs(columns.mean() - 72) < 2
        assert abs(columns.min() - 38) < 3 and abs(columns.max() - 106) < 3 and abs(np.ptp(rows) - 19) < 3
        page["#painted"].click()
        page["#paintLabel:text('Edit the mask')"].wait_for()
        page["#prompt"].fill("a circle")
        (content,) = page.draw()
        mask = np.array(opened(page.file("m.state.desk.mask")).convert("L")) > 127
        before, after = (np.array(opened(each).convert("RGB")) for each in (png((192, 128)), content))
        assert mask.sum() == len(rows) and (before[~mask] == after[~mask]).all()
        assert (before[mask] != after[mask]).any()


def test_a_mask_is_painted_by_touch_and_by_keys(browser: Any, tiny: Running) -> None:
    """Erasing, undoing, clearing and inverting too; the page does not scroll under the finger."""
    with desk(browser, tiny, 360, 740, has_touch=True) as page:
        begun(page)
        box = page["#layer"].bounding_box()
        top = page.page.evaluate("scrollY")
        touch = page.context.new_cdp_session(page.page)
        for kind, part in (("touchStart", 0.3), ("touchMove", 0.4), ("touchMove", 0.7), ("touchEnd", None)):
            x, y = box["x"] + 0.5 * box["width"], box["y"] + (part or 0) * box["height"]
            points = [] if part is None else [{"x": x, "y": y}]
            touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
        touched = layer(page)
        rows, columns = np.nonzero(touched)
        assert abs(rows.mean() - 64) < 3 and abs(columns.mean() - 96) < 2 and np.ptp(rows) > 50
        assert page.page.evaluate("scrollY") == top

        keyboard = page.page.keyboard
        page["#layer"].focus()
        for _ in range(30):
            keyboard.press("ArrowLeft")
        keyboard.press("Space")
        dotted = layer(page)
        assert dotted.sum() > touched.sum() and dotted[:, :9].any()
        keyboard.down("Space")
        keyboard.press("ArrowUp")
        keyboard.press("ArrowUp")
        keyboard.up("Space")
        assert layer(page).sum() > dotted.sum()
        keyboard.press("u")
        keyboard.press("ArrowDown")
        keyboard.press("ArrowDown")
        keyboard.press("e")
        keyboard.press("Space")
        assert (layer(page) <= dotted).all() and layer(page).sum() < dotted.sum()
        keyboard.press("Control+z")
        page["#undo"].click()
        assert (layer(page) == touched).all()
        page["#invert"].click()
        assert (layer(page) != touched).mean() > 0.98  # but for the edge's half-painted pixels
        page["#clear"].click()
        assert not layer(page).any()
        keyboard.press("Escape")
        page["#masking"].wait_for(state="hidden")
        assert page.run("m.state.desk.mask") is None
