"""Laws: what a field of the webui means here, and what is refused, with a sentence that names it."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import numpy as np
import pytest
import requests
import webuiapi
from PIL import Image

from stable_diffusion.diffusion.names import SAMPLERS, SPACINGS
from stable_diffusion.serve import page
from stable_diffusion.serve.door import Refused, Served
from stable_diffusion.serve.webui_fields import (
    DONE,
    DONE_WITH_IMAGES,
    ONLY,
    ONLY_HIRES,
    ONLY_SETTINGS,
    read,
    repainted,
    sampler_of,
)
from tests.serve.served import PATIENCE, Running
from tests.serve.webui_files import Post, colours, png


def layer(*alphas: int) -> Image.Image:
    """A pixel a column: black, of these opacities."""
    picture = Image.new("RGBA", (len(alphas), 1))
    for x, alpha in enumerate(alphas):
        picture.putpixel((x, 0), (0, 0, 0, alpha))
    return picture


def greys(*levels: int, mode: str = "L") -> Image.Image:
    return Image.fromarray(np.array([levels], dtype=np.uint8)).convert(mode)


@pytest.mark.parametrize(
    ("mask", "white"),
    [
        (greys(0, 127, 128, 255), [0, 0, 1, 1]),
        (greys(0, 1), [0, 0]),
        (greys(0, 255, mode="RGB"), [0, 1]),
        (greys(0, 255, mode="RGBA"), [0, 1]),
        (layer(0, 128, 129, 255), [0, 0, 1, 1]),
        (layer(255, 255), [0, 0]),
        (Image.merge("LA", [greys(0, 255), greys(255, 0)]), [0, 1]),
        (greys(0, 255, mode="P"), [0, 1]),
        (greys(0, 255, mode="1"), [0, 1]),
        (Image.fromarray(np.array([[0, 65535]], dtype=np.uint16)), [0, 1]),
    ],
)
def test_masks_as_the_webui_reads_them(mask: Image.Image, white: list[int]) -> None:
    """White is repainted, or what is more than half opaque in a layer; the opposite of OpenAI's masks."""
    for invert in (False, True):
        found = np.asarray(repainted(mask, invert=invert))[0]
        assert found.tolist() == [255 * (each != invert) for each in white]


def test_resize_modes(webui: Running) -> None:
    """0 stretches the picture and its mask, 1 crops both; equal shapes are left to the door."""
    image, mask = png(colours(40, 20)), png(greys(*[255] * 20, *[0] * 20).resize((40, 20)))
    body = {"init_images": [image], "mask": mask, "width": 32, "height": 64}

    def fields(**more: Any) -> dict[str, Any]:
        return read(body | more, webui.server.models.default, syntax="plain", with_images=True)

    stretched, cropped = fields(), fields(resize_mode=1)
    assert stretched["image"].size == stretched["mask_image"].size == (32, 64)
    assert np.asarray(stretched["mask_image"]).mean() == 127.5
    assert cropped["image"].size == (40, 20) and fields(width=80, height=40)["image"].size == (40, 20)
    body |= {"width": None, "init_images": [png(Image.new("1", (10_000, 20)))]}
    assert fields()["image"].size == (2048, 64), "a side that nobody gave is no longer than one may be"


# Names.


def test_every_sampler_of_the_list_draws(api: webuiapi.WebUIApi) -> None:
    rows = api.get_samplers()
    assert api.util_get_sampler_names() == sorted(row.webui for row in SAMPLERS.values())
    for row in rows:
        result = api.txt2img(prompt="a fox", sampler_name=row["name"], steps=3, seed=1, width=32, height=32)
        assert result.info["sampler_name"] == row["name"]
        assert all(sampler_of(alias)[0] == sampler_of(row["name"])[0] for alias in row["aliases"])


def test_every_scheduler_of_the_list_draws(api: webuiapi.WebUIApi) -> None:
    """Each model has its own list: Karras is not for a rectified flow."""
    assert "karras" not in api.util_get_scheduler_names()
    api.set_options({"sd_model_checkpoint": "discrete"})
    rows = {row["name"]: row["label"] for row in api.get_schedulers()}
    assert set(rows) == {"automatic", *SPACINGS} and rows["karras"] == "Karras"
    for name in (*rows, *rows.values(), "Uniform", "normal", "simple"):
        assert api.txt2img(scheduler=name, sampler_name="Euler", steps=3, width=32, height=32).image


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("DPM++ 2M Karras", ("dpmpp_2m", "karras")),
        ("DPM++ 2M SDE Exponential", ("dpmpp_2m_sde", "exponential")),
        ("Euler a", ("euler_a", None)),
        ("euler SGM Uniform", ("euler", "sgm_uniform")),
        ("LCM", ("lcm", None)),
        ("dpmpp_3m", ("dpmpp_3m", None)),
    ],
)
def test_names_of_samplers(name: str, expected: tuple[str, str | None]) -> None:
    assert sampler_of(name) == expected


def test_karras_behind_a_samplers_name(webui: Running) -> None:
    """A rectified flow has none, and many clients write it whatever the model; a scheduler is meant as it is said."""
    flow, discrete = webui.server.models.all["tiny"], webui.server.models.all["discrete"]
    body = {"sampler_name": "DPM++ 2M Karras", "scheduler": "automatic"}

    def spacing(served: Served, **more: str) -> str | None:
        return read(body | more, served, syntax="plain", with_images=False).get("spacing")

    assert (spacing(flow), spacing(discrete)) == (None, "karras")
    assert spacing(discrete, scheduler="Beta") == "karras"  # as in the webui
    assert spacing(flow, scheduler="normal") == "linspace"
    with pytest.raises(
        Refused, match="the model 'tiny' has no scheduler 'karras': choose one of Automatic, leading"
    ):
        spacing(flow, scheduler="Karras")


# Other programs.

OPEN_WEBUI = {
    "prompt": "a fox",
    "batch_size": 1,
    "width": 512,
    "height": 512,
    "steps": 3,
    "negative_prompt": "dark",
}
SILLY_TAVERN = {
    **{"url": "http://127.0.0.1:7860", "auth": "", "prompt": "a fox", "negative_prompt": "dark"},
    **{
        "sampler_name": "DDIM",
        "scheduler": "normal",
        "steps": 3,
        "cfg_scale": 7,
        "width": 512,
        "height": 512,
    },
    **{"restore_faces": False, "enable_hr": False, "hr_upscaler": "Latent", "hr_scale": 1},
    **{"hr_additional_modules": [], "denoising_strength": 0.7, "hr_second_pass_steps": 0, "clip_skip": 1},
    **{"override_settings": {"CLIP_stop_at_last_layers": 1}, "override_settings_restore_afterwards": True},
    **{"save_images": True, "send_images": True, "do_not_save_grid": False, "do_not_save_samples": False},
}
TEXTGEN = {
    **{
        "prompt": "(Masterpiece:1.1), detailed, intricate(a fox:1)",
        "seed": -1,
        "sampler_name": "DPM++ 2M Karras",
    },
    **{
        "enable_hr": False,
        "hr_scale": "1.0",
        "hr_upscaler": "ESRGAN_4x",
        "denoising_strength": 0.61,
        "steps": 3,
    },
    **{"cfg_scale": 7, "width": 512, "height": 512, "restore_faces": False},
    **{"override_settings_restore_afterwards": True, "negative_prompt": "(worst quality, low quality:1.3)"},
}


@pytest.mark.parametrize(
    "body", [OPEN_WEBUI, SILLY_TAVERN, TEXTGEN], ids=["Open WebUI", "SillyTavern", "textgen"]
)
def test_requests_of_other_programs(post: Post, body: dict[str, Any]) -> None:
    """The bodies that they send, by their sources; what means nothing here is named, and not sent back."""
    answer = post("txt2img", body)
    picture = Image.open(io.BytesIO(base64.b64decode(answer.json()["images"][0])))
    assert answer.status_code == 200 and picture.size == (512, 512)
    info = json.loads(answer.json()["info"])
    assert info["cfg_scale"] == body.get("cfg_scale", 2.0) and info["infotexts"][0].startswith(body["prompt"])
    ignored = "url, auth, hr_additional_modules" if body is SILLY_TAVERN else None
    assert answer.headers.get("x-minisd-ignored") == ignored and "auth" not in answer.json()["parameters"]


def test_the_description_has_the_fields_that_are_done() -> None:
    schemas = json.loads(page.FILES["/openapi.json"].content)["components"]["schemas"]
    both = schemas["WebuiRequest"]["properties"].keys()
    texts, images = (
        schemas[name]["allOf"][1]["properties"].keys() for name in ("WebuiText2Image", "WebuiImage2Image")
    )
    assert both | texts == {*DONE, "hr_upscaler"}
    assert images == {*DONE_WITH_IMAGES, "denoising_strength"}


# Refusals.

PICTURE = {"init_images": [png(colours(8, 8))]}
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    *(("txt2img", {name: "what nobody does"}, name) for name in ONLY),
    *(("txt2img", {"override_settings": {name: 7}}, f"override_settings.{name}") for name in ONLY_SETTINGS),
    *(("txt2img", {"enable_hr": True, name: 7}, name) for name in ONLY_HIRES),
    ("txt2img", {"enable_hr": True, "hr_scale": 5}, "hr_scale"),
    ("txt2img", {"enable_hr": "yes"}, "enable_hr"),
    ("txt2img", {"override_settings": [1]}, "override_settings"),
    ("txt2img", {"override_settings": {"sd_model_checkpoint": "x"}}, "sd_model_checkpoint"),
    ("txt2img", {"prompt": ["a"]}, "prompt"),
    ("txt2img", {"prompt": "a" * 10_001}, "prompt"),
    ("txt2img", {"negative_prompt": 3}, "negative_prompt"),
    *(("txt2img", {"steps": value}, "steps") for value in (0, 151, 2.5, "many", True, [3], 10**400)),
    ("txt2img", {"cfg_scale": "high"}, "cfg_scale"),
    ("txt2img", {"width": 2049}, "width"),
    ("txt2img", {"height": 0}, "height"),
    ("txt2img", {"batch_size": 17}, "batch_size"),
    ("txt2img", {"batch_size": 4, "n_iter": 5}, "n_iter"),
    ("txt2img", {"seed": 2**63}, "seed"),
    ("txt2img", {"subseed_strength": 2}, "subseed_strength"),
    ("txt2img", {"sampler_name": "DPM fast"}, "sampler_name"),
    ("txt2img", {"scheduler": "KL Optimal"}, "scheduler"),
    ("txt2img", {"scheduler": "Karras"}, "scheduler"),  # on a rectified flow
    ("txt2img", {"sampler_name": "Euler a", "eta": 0}, "eta"),
    ("img2img", {}, "init_images"),
    ("img2img", {"init_images": []}, "init_images"),
    ("img2img", {"init_images": PICTURE["init_images"] * 2}, "init_images"),
    ("img2img", {"init_images": ["http://127.0.0.1/a.png"]}, "init_images"),
    ("img2img", {"init_images": ["/etc/passwd"]}, "init_images"),
    ("img2img", {"init_images": [3]}, "init_images"),
    ("img2img", PICTURE | {"mask": ["a"]}, "mask"),
    ("img2img", PICTURE | {"mask": png(Image.new("L", (8, 8)))}, "mask"),
    ("img2img", PICTURE | {"mask": png(Image.new("L", (8, 8), 255)), "inpainting_mask_invert": 2}, "invert"),
    ("img2img", PICTURE | {"resize_mode": 2}, "resize_mode"),
    ("img2img", PICTURE | {"denoising_strength": 0}, "denoising_strength"),
    ("img2img", PICTURE | {"include_init_images": 1}, "include_init_images"),
    ("png-info", {}, "image"),
    ("png-info", {"image": "https://example.org/a.png"}, "image"),
]


@pytest.mark.parametrize(("name", "body", "field"), REFUSED)
def test_refusals(post: Post, name: str, body: dict[str, Any], field: str) -> None:
    """In A1111's form, with a sentence that names the field."""
    answer = post(name, body)
    assert answer.status_code == 422
    assert set(answer.json()) == {"error", "detail", "body", "errors"} and field in answer.json()["detail"]


def test_bodies_that_are_none(webui: Running) -> None:
    url = f"{webui.url}/sdapi/v1/txt2img"
    typed = {"headers": {"Content-Type": "application/json"}, "timeout": PATIENCE}
    for body in ("{", "[1]", "3", "[" * 100_000):
        assert requests.post(url, data=body, **typed).status_code == 422
    answer = requests.post(url, data='{"mask_blur": NaN, "steps": 1}', **typed)
    assert answer.status_code == 200 and answer.json()["parameters"] == {"mask_blur": None, "steps": 1}
    assert requests.post(url, data={"prompt": "a fox"}, timeout=PATIENCE).status_code == 415
