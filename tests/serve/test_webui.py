"""Journeys: programs that draw with AUTOMATIC1111's webui, and what they are told. `webuiapi` is the real client."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import requests
import torch
import webuiapi
from PIL import Image, PngImagePlugin
from safetensors.torch import save_file

from stable_diffusion.config import SamplerConfig, ScheduleConfig
from stable_diffusion.diffusion.names import SAMPLERS, SPACINGS
from stable_diffusion.generation.metadata import parameters
from stable_diffusion.model import DiffusionModel
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
from tests.generation.test_infotext import A1111
from tests.lively import lively
from tests.serve.served import PATIENCE, Gated, Running, gated_job, serving, until
from tests.tiny import TINY, tiny_model

DISCRETE = replace(
    TINY,
    name="discrete",
    schedule=ScheduleConfig(prediction_type="v_prediction"),
    sampler=SamplerConfig(name="ddim"),
)


def png(picture: Image.Image) -> str:
    content = io.BytesIO()
    picture.save(content, format="PNG")
    return base64.b64encode(content.getvalue()).decode()


def colours(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server of two models, the second with a LoRA."""
    first, second = tiny_model(), tiny_model(DISCRETE, seed=1)
    for model in (first, second):
        lively(model.unet)
    second.load_lora(lora_file(second, tmp_path_factory.mktemp("loras") / "fox.safetensors"), 0.0)
    with serving({"tiny": first, "discrete": second}) as running:
        yield running


def lora_file(model: DiffusionModel, file: Any) -> Any:
    """A LoRA of one layer, as kohya's scripts name it."""
    name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"
    outputs, inputs = dict(model.unet.named_modules())[name].weight.shape
    values = torch.linspace(-1, 1, inputs)
    tensors = {"up": torch.ones(outputs, 1), "down": values[None]}
    module = f"lora_unet_{name.replace('.', '_')}"
    save_file({f"{module}.lora_{key}.weight": value for key, value in tensors.items()}, file)
    return file


def client(running: Running) -> webuiapi.WebUIApi:
    return webuiapi.WebUIApi(baseurl=f"{running.url}/sdapi/v1", steps=2)


@pytest.fixture
def api(running: Running) -> webuiapi.WebUIApi:
    running.server.chosen.clear()
    return client(running)


@pytest.fixture
def post(running: Running) -> Callable[[str, Any], requests.Response]:
    running.server.chosen.clear()
    return lambda name, body: requests.post(f"{running.url}/sdapi/v1/{name}", json=body, timeout=PATIENCE)


OURS = "sdapi 127.0.0.1"
"""The client that these tests are."""


@contextmanager
def asking(running: Running) -> Iterator[Callable[[dict[str, Any]], Future[requests.Response]]]:
    """Posts a txt2img in another thread, and is back when the job is in the queue."""
    with ThreadPoolExecutor(2) as threads:

        def start(body: dict[str, Any]) -> Future[requests.Response]:
            before = len(running.jobs.of(OURS))
            url = f"{running.url}/sdapi/v1/txt2img"
            answer = threads.submit(requests.post, url, json=body, timeout=PATIENCE)
            until(lambda: answer.done() or len(running.jobs.of(OURS)) > before)
            return answer

        yield start


# Drawing.


def test_a_picture_from_a_text(api: webuiapi.WebUIApi, running: Running) -> None:
    """It is the model's own, at the size that was asked for, and says how it was made."""
    given = {"prompt": "a red fox", "negative_prompt": "blurry", "seed": 5, "cfg_scale": 3.0}
    result = api.txt2img(**given, sampler_name="DDIM", width=32, height=32)
    (expected,) = running.server.models.default.model.generate(
        "a red fox", negative_prompt="blurry", seed=5, guidance_scale=3.0, sampler="ddim", eta=1.0,
        num_inference_steps=2,
    )  # fmt: skip
    assert np.array_equal(np.asarray(result.image), np.asarray(expected))
    settings = json.loads(result.image.text["minisd"])
    assert (settings["seed"], settings["num_inference_steps"], settings["guidance_scale"]) == (5, 2, 3.0)
    assert result.info["infotexts"] == [parameters(settings)] == [result.image.text["parameters"]]
    assert {key: result.info[key] for key in ("seed", "all_seeds", "width", "height", "steps", "cfg_scale")} == {
        "seed": 5, "all_seeds": [5], "width": 32, "height": 32, "steps": 2, "cfg_scale": 3.0,
    }  # fmt: skip
    assert result.info["sampler_name"] == "DDIM" and result.info["sd_model_name"] == "tiny"
    assert result.info["all_prompts"] == ["a red fox"] and result.info["all_negative_prompts"] == ["blurry"]
    assert result.parameters["prompt"] == "a red fox" and result.parameters["steps"] == 2


def test_batches_have_seeds_that_follow(api: webuiapi.WebUIApi) -> None:
    """Each of them is the picture of its seed alone."""
    result = api.txt2img(prompt="a fox", batch_size=2, n_iter=2, seed=7, width=32, height=32)
    assert result.info["all_seeds"] == [7, 8, 9, 10] and len(result.images) == 4
    assert [f"Seed: {seed}," in text for seed, text in enumerate(result.info["infotexts"], 7)] == [True] * 4
    assert result.info["all_prompts"] == ["a fox"] * 4
    alone = api.txt2img(prompt="a fox", seed=9, width=32, height=32)
    assert alone.image.tobytes() == result.images[2].tobytes() != result.images[1].tobytes()


def test_any_size_and_a_random_seed(api: webuiapi.WebUIApi) -> None:
    """The file has the size asked for, its settings that at which it was drawn; the seed is reported."""
    result = api.txt2img(prompt="a fox", width=512, height=256)
    settings = json.loads(result.image.text["minisd"])
    assert result.image.size == (512, 256) == (result.info["width"], result.info["height"])
    assert settings["width"] * settings["height"] <= 40 * 40 and settings["width"] > settings["height"]
    again = api.txt2img(prompt="a fox", width=512, height=256, seed=result.info["seed"])
    assert result.info["seed"] >= 0 and again.image.tobytes() == result.image.tobytes()


def test_what_is_not_said_is_the_models_own(post: Callable[[str, Any], requests.Response]) -> None:
    """Not the webui's: no 20 steps, no guidance of 7, no 512 pixels."""
    answer = post("txt2img", {"prompt": "a fox", "batch_size": None}).json()
    assert "info" in answer, answer
    info = json.loads(answer["info"])
    assert (info["steps"], info["cfg_scale"], info["width"], info["sampler_name"]) == (4, 2.0, 32, "Euler")
    assert set(answer) == {"images", "parameters", "info"} and not answer["images"][0].startswith("data:")


def test_a_picture_from_a_picture(api: webuiapi.WebUIApi) -> None:
    image = colours(32, 32)
    result = api.img2img(
        [image], prompt="a fox", denoising_strength=0.5, seed=1, width=64, height=64, steps=4
    )
    assert result.image.size == (64, 64) and result.info["denoising_strength"] == 0.5
    assert json.loads(result.image.text["minisd"])["strength"] == 0.5
    assert "init_images" not in result.parameters
    kept = api.img2img([image], denoising_strength=0.5, include_init_images=True, width=32, height=32)
    assert kept.parameters["init_images"][0].startswith("data:image/png;base64,")


@pytest.mark.parametrize("invert", [0, 1])
@pytest.mark.parametrize("side", [32, 80])
def test_only_what_is_white_is_repainted(api: webuiapi.WebUIApi, invert: int, side: int) -> None:
    """Every byte outside of the mask stays, at the model's size and at another."""
    image, mask = colours(side, side), Image.new("L", (side, side))
    mask.paste(255, (0, 0, side // 2, side))
    result = api.img2img(
        [image], mask_image=mask, inpainting_mask_invert=invert, prompt="a fox", denoising_strength=1,
        width=side, height=side,
    )  # fmt: skip
    white = np.asarray(mask) == (0 if invert else 255)
    before, after = np.asarray(image), np.asarray(result.image.convert("RGB"))
    assert np.array_equal(before[~white], after[~white]) and not np.array_equal(before[white], after[white])


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


def test_resize_modes(running: Running) -> None:
    """0 stretches the picture and its mask, 1 crops both; equal shapes are left to the door."""
    image, mask = png(colours(40, 20)), png(greys(*[255] * 20, *[0] * 20).resize((40, 20)))
    body = {"init_images": [image], "mask": mask, "width": 32, "height": 64}

    def fields(**more: Any) -> dict[str, Any]:
        return read(body | more, running.server.models.default, syntax="plain", with_images=True)

    stretched, cropped = fields(), fields(resize_mode=1)
    assert stretched["image"].size == stretched["mask_image"].size == (32, 64)
    assert np.asarray(stretched["mask_image"]).mean() == 127.5
    assert cropped["image"].size == (40, 20) and fields(width=80, height=40)["image"].size == (40, 20)


def test_a_second_larger_pass(api: webuiapi.WebUIApi) -> None:
    """The file is so many times as large as was asked for, whatever the size that is drawn."""
    given = {"prompt": "a fox", "width": 64, "height": 32, "enable_hr": True, "hr_scale": 1.5}
    result = api.txt2img(**given, denoising_strength=0.5)
    assert result.image.size == (96, 48) and result.info["denoising_strength"] == 0.5
    assert "Hires upscale: 1.5" in result.info["infotexts"][0]
    with pytest.raises(RuntimeError, match=r"422.*hr_scale"):
        api.txt2img(**given | {"width": 2048})
    (mode,) = {row["name"] for row in api.get_latent_upscale_modes()} - {"Latent"}
    assert f"Hires upscaler: {mode}" in result.info["infotexts"][0]


def test_variations_of_a_picture(api: webuiapi.WebUIApi) -> None:
    """They share the seed, and the other seed counts up."""
    given = {"prompt": "a fox", "seed": 3, "width": 32, "height": 32}
    result = api.txt2img(**given, subseed=9, subseed_strength=0.3, batch_size=2)
    assert (result.info["all_seeds"], result.info["all_subseeds"]) == ([3, 3], [9, 10])
    assert "Variation seed: 10" in result.info["infotexts"][1]
    assert api.txt2img(**given, subseed_strength=0.3).info["subseed"] >= 0
    plain = api.txt2img(**given)
    assert plain.info["all_subseeds"] == [-1] and plain.image.tobytes() != result.images[0].tobytes()


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


def test_karras_behind_a_samplers_name(running: Running) -> None:
    """A rectified flow has none, and many clients write it whatever the model; a scheduler is meant as it is said."""
    flow, discrete = running.server.models.all["tiny"], running.server.models.all["discrete"]
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


# Jobs.


def test_progress_of_a_job_in_work() -> None:
    """It advances with each step, shows the picture so far to those who ask, and is 0 when nothing is drawn."""
    model = Gated(tiny_model())
    with serving({"tiny": model}) as running, asking(running) as start:
        api = client(running)
        idle = api.get_progress()
        assert (idle["progress"], idle["state"]["job_count"], idle["current_image"]) == (0, 0, None)
        api.util_wait_for_ready(check_interval=0.05)
        other = running.jobs.add(gated_job(model, "other"))
        answer = start({"prompt": "a fox", "steps": 4, "n_iter": 2})
        waiting = api.get_progress()
        assert (waiting["progress"], waiting["state"]["job_count"]) == (0, 2) and waiting["textinfo"]
        model.let(2)
        until(lambda: other.over)
        model.let(1)
        until(lambda: api.get_progress()["progress"] == 1 / 8)
        state = api.get_progress()["state"]
        assert (state["job_no"], state["sampling_step"], state["sampling_steps"]) == (0, 1, 4)
        model.let(1)
        until(lambda: api.get_progress()["progress"] == 2 / 8)
        image = api.get_progress()["current_image"]
        assert Image.open(io.BytesIO(base64.b64decode(image))).size == (32, 32)
        quiet = running.get("/sdapi/v1/progress?skip_current_image=true").json
        assert quiet["current_image"] is None and quiet["progress"] == 2 / 8 and quiet["eta_relative"] > 0
        model.let(4)
        until(lambda: api.get_progress()["progress"] == 5 / 8)
        assert api.get_progress()["state"]["job_no"] == 1
        model.let(10)
        assert len(answer.result().json()["images"]) == 2 and api.get_progress()["progress"] == 0


def test_interrupt_and_skip_end_their_own_jobs_only() -> None:
    """In work or waiting; jobs of another surface, or of another address, are drawn to their end."""
    model = Gated(tiny_model())
    with serving({"tiny": model}) as running, asking(running) as start:
        api = client(running)
        others = [running.jobs.add(gated_job(model, "a", client=key)) for key in ("page", "sdapi 10.0.0.9")]
        waits = start({"prompt": "a fox", "steps": 2})
        assert api.interrupt() == {} and waits.result().status_code == 409
        assert api.skip() == {}  # nothing is left to end
        model.let(4)
        until(lambda: all(other.status == "done" for other in others))
        works = start({"prompt": "a fox", "steps": 2, "n_iter": 3, "seed": 8})
        last = running.jobs.add(gated_job(model, "a", client="page"))
        model.let(3)
        until(lambda: api.get_progress()["state"]["job_no"] == 1)
        api.skip()
        model.let(10)
        answer = works.result()  # what was done before
        assert answer.status_code == 200 and len(answer.json()["images"]) == 1
        assert json.loads(answer.json()["info"])["all_seeds"] == [8]
        until(lambda: last.status == "done")


def test_a_client_that_goes_away_ends_its_job() -> None:
    model = Gated(tiny_model())
    with serving({"tiny": model}) as running:
        running.jobs.add(gated_job(model, "a"))
        with pytest.raises(requests.ReadTimeout):
            requests.post(f"{running.url}/sdapi/v1/txt2img", json={"prompt": "a fox"}, timeout=2)
        until(lambda: not running.jobs.of(OURS))
        model.let(5)


# Options, lists and files.


def test_options_are_read_and_written_back(
    api: webuiapi.WebUIApi, post: Callable[[str, Any], requests.Response], running: Running
) -> None:
    """As Open WebUI does; the model is chosen for the client that chose, and for a picture alone where that says so."""
    options = api.get_options()
    assert options == {"sd_model_checkpoint": "tiny", "samples_format": "png"}
    assert api.set_options(options | {"unknown": [1], "filter_nsfw": True}) is None
    assert [row["title"] for row in api.get_sd_models()] == ["tiny", "discrete"]
    api.util_set_model("discret")
    assert api.util_get_current_model() == "discrete" == running.server.chosen["sdapi 127.0.0.1"]
    assert api.txt2img(prompt="a fox", width=32, height=32).info["sd_model_name"] == "discrete"
    given = {"override_settings": {"sd_model_checkpoint": "tiny"}}
    assert api.txt2img(prompt="a fox", width=32, height=32, **given).info["sd_model_name"] == "tiny"
    assert api.util_get_current_model() == "discrete"
    for value in ("/etc/passwd", "../tiny", "no such model", ["tiny"], 3):
        answer = post("options", {"sd_model_checkpoint": value})
        assert answer.status_code == 422 and "sd_model_checkpoint" in answer.json()["detail"]
    assert post("options", {"samples_format": "jpg"}).status_code == 422


def test_png_info(api: webuiapi.WebUIApi, post: Callable[[str, Any], requests.Response]) -> None:
    """Of a picture of ours, of one that a webui wrote, and of one that says nothing."""
    drawn = api.txt2img(prompt="a fox", negative_prompt="blurry, dark", seed=4, width=32, height=32)
    ours = api.png_info(drawn.image)
    assert (
        ours.info == drawn.info["infotexts"][0]
        and "minisd" in post("png-info", {"image": png_of(drawn.image)}).json()["items"]
    )
    assert (ours.parameters["Prompt"], ours.parameters["Negative prompt"]) == ("a fox", "blurry, dark")
    assert (ours.parameters["Seed"], ours.parameters["Size-1"], ours.parameters["Sampler"]) == (
        "4",
        "32",
        "Euler a",
    )
    theirs = Image.new("RGB", (8, 8))
    theirs.info["parameters"] = A1111
    assert api.png_info(theirs).info == A1111
    assert api.png_info(Image.new("RGB", (8, 8))).json == {"info": "", "items": {}, "parameters": {}}


def png_of(picture: Image.Image) -> str:
    """With its texts."""
    texts, content = PngImagePlugin.PngInfo(), io.BytesIO()
    for key, value in picture.info.items():
        texts.add_text(key, value)
    picture.save(content, format="PNG", pnginfo=texts)
    return base64.b64encode(content.getvalue()).decode()


def test_loras(api: webuiapi.WebUIApi) -> None:
    """They are listed, act where a prompt names them, and others are refused."""
    assert api.get_loras() == []
    api.set_options({"sd_model_checkpoint": "discrete"})
    assert [row["name"] for row in api.get_loras()] == ["fox"]
    given = {"seed": 1, "width": 32, "height": 32}
    plain, with_lora = (api.txt2img(prompt=f"a fox{tag}", **given) for tag in ("", " <lora:fox:1>"))
    assert plain.image.tobytes() != with_lora.image.tobytes()
    assert "<lora:fox:1>" in with_lora.info["infotexts"][0]
    with pytest.raises(RuntimeError, match=r"422.*unknown LoRA"):
        api.txt2img(prompt="a fox <lora:cat:1>", **given)


def test_prompts_have_the_webuis_syntax(api: webuiapi.WebUIApi) -> None:
    given = {"seed": 1, "width": 32, "height": 32}
    texts = ("a red fox", "a (red fox:1.0)", "a (red fox:1.6)")
    plain, same, heavier = (api.txt2img(prompt=text, **given).image.tobytes() for text in texts)
    assert plain == same != heavier


def test_what_clients_ask_for_when_they_start(api: webuiapi.WebUIApi, running: Running) -> None:
    assert api.get_scripts() == {"txt2img": [], "img2img": []}
    assert api.get_embeddings() == {"loaded": {}, "skipped": {}} and api.get_cmd_flags() == {}
    assert [row["name"] for row in api.get_upscalers()] == ["None"]
    for names in ("hypernetworks", "face_restorers", "realesrgan_models", "prompt_styles", "sd_vae"):
        assert getattr(api, f"get_{names}")() == []
    assert isinstance(api.get_latent_upscale_modes(), list)
    for name in ("refresh-checkpoints", "unload-checkpoint", "reload-checkpoint"):
        answer = requests.post(f"{running.url}/sdapi/v1/{name}", json="", timeout=PATIENCE)  # as textgen does
        assert answer.status_code == 200 and answer.json() is None
    missing = requests.get(f"{running.url}/sdapi/v1/nothing", timeout=PATIENCE)
    assert missing.status_code == 404 and missing.json()["detail"] == "Not Found"


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
def test_requests_of_other_programs(
    post: Callable[[str, Any], requests.Response], body: dict[str, Any]
) -> None:
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
def test_refusals(
    post: Callable[[str, Any], requests.Response], name: str, body: dict[str, Any], field: str
) -> None:
    """In A1111's form, with a sentence that names the field."""
    answer = post(name, body)
    assert answer.status_code == 422
    assert set(answer.json()) == {"error", "detail", "body", "errors"} and field in answer.json()["detail"]


def test_bodies_that_are_none(running: Running) -> None:
    url = f"{running.url}/sdapi/v1/txt2img"
    typed = {"headers": {"Content-Type": "application/json"}, "timeout": PATIENCE}
    for body in ("{", "[1]", "3", "[" * 100_000):
        assert requests.post(url, data=body, **typed).status_code == 422
    answer = requests.post(url, data='{"mask_blur": NaN, "steps": 1}', **typed)
    assert answer.status_code == 200 and answer.json()["parameters"] == {"mask_blur": None, "steps": 1}
    assert requests.post(url, data={"prompt": "a fox"}, timeout=PATIENCE).status_code == 415
