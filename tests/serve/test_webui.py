"""Journeys: programs that draw with AUTOMATIC1111's webui. `webuiapi` is the real client."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import requests
import webuiapi
from PIL import Image, PngImagePlugin

from stable_diffusion.generation.metadata import parameters
from tests.generation.test_infotext import A1111
from tests.lively import lively
from tests.serve.served import PATIENCE, Gated, Running, gated_job, serving, until
from tests.serve.webui_files import OURS, Post, asking, client, colours, lora_file
from tests.tiny import tiny_model


def test_a_picture_from_a_text(api: webuiapi.WebUIApi, webui: Running) -> None:
    """It is the model's own, at the size that was asked for, and says how it was made."""
    given = {"prompt": "a red fox", "negative_prompt": "blurry", "seed": 5, "cfg_scale": 3.0}
    result = api.txt2img(**given, sampler_name="DDIM", width=32, height=32)
    (expected,) = webui.server.models.default.model.generate(
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


def test_what_is_not_said_is_the_models_own(post: Post) -> None:
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


@pytest.mark.parametrize("proxied", [False, True])
def test_nobody_takes_anothers_address(proxied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only behind a proxy of this machine is a header believed that says whose a request is."""
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "*")
    with serving({"tiny": Gated(tiny_model())}, proxied=proxied) as running:
        job = running.jobs.add(gated_job(running.server.models.default.model, "a", client="sdapi 10.0.0.9"))
        assert running.post("/sdapi/v1/interrupt", {}, **{"X-Forwarded-For": "10.0.0.9"}).status == 200
        assert job.stop.is_set() == proxied


def test_a_client_that_goes_away_ends_its_job() -> None:
    model = Gated(tiny_model())
    with serving({"tiny": model}) as running:
        running.jobs.add(gated_job(model, "a"))
        with pytest.raises(requests.ReadTimeout):
            requests.post(f"{running.url}/sdapi/v1/txt2img", json={"prompt": "a fox"}, timeout=2)
        until(lambda: not running.jobs.of(OURS))
        model.let(5)


# Options, lists and files.


def test_options_are_read_and_written_back(api: webuiapi.WebUIApi, post: Post, webui: Running) -> None:
    """As Open WebUI does; the model is chosen for the client that chose, and for a picture alone where that says so."""
    options = api.get_options()
    assert options == {"sd_model_checkpoint": "tiny", "samples_format": "png"}
    assert api.set_options(options | {"unknown": [1], "filter_nsfw": True}) is None
    assert [row["title"] for row in api.get_sd_models()] == ["tiny", "discrete"]
    api.util_set_model("discret")
    assert api.util_get_current_model() == "discrete" == webui.server.chosen["sdapi 127.0.0.1"]
    assert api.txt2img(prompt="a fox", width=32, height=32).info["sd_model_name"] == "discrete"
    given = {"override_settings": {"sd_model_checkpoint": "tiny"}}
    assert api.txt2img(prompt="a fox", width=32, height=32, **given).info["sd_model_name"] == "tiny"
    assert api.util_get_current_model() == "discrete"
    for value in ("/etc/passwd", "../tiny", "no such model", ["tiny"], 3):
        answer = post("options", {"sd_model_checkpoint": value})
        assert answer.status_code == 422 and "sd_model_checkpoint" in answer.json()["detail"]
    assert post("options", {"samples_format": "jpg"}).status_code == 422


def test_png_info(api: webuiapi.WebUIApi, post: Post) -> None:
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


def test_the_loras_of_a_prompt_act_alone(tmp_path: Path) -> None:
    """Without a tag those of the start do, with their weights there."""
    model = tiny_model()
    lively(model.unet)
    for name, weight in (("fox", 0.5), ("owl", 2.0)):
        model.load_lora(lora_file(model, tmp_path / f"{name}.safetensors"), weight)
    with serving({"tiny": model}) as running:
        for tag, lora in (
            ("", {"fox": 0.5, "owl": 2.0}),
            ("<lora:fox:1.5>", {"fox": 1.5}),
            ("<lora:fox:1><lora:owl:0>", {"fox": 1.0}),
        ):
            result = client(running).txt2img(prompt=f"a{tag}", seed=1, cfg_scale=2, width=32, height=32)
            (expected,) = model.generate(
                "a", seed=1, guidance_scale=2, num_inference_steps=2, sampler="euler_a", lora=lora
            )
            assert result.image.tobytes() == expected.tobytes(), tag
            assert ("owl" in result.info["infotexts"][0]) == (tag != "<lora:fox:1.5>")


def test_prompts_have_the_webuis_syntax(api: webuiapi.WebUIApi) -> None:
    given = {"seed": 1, "width": 32, "height": 32}
    texts = ("a red fox", "a (red fox:1.0)", "a (red fox:1.6)")
    plain, same, heavier = (api.txt2img(prompt=text, **given).image.tobytes() for text in texts)
    assert plain == same != heavier


def test_what_clients_ask_for_when_they_start(api: webuiapi.WebUIApi, webui: Running) -> None:
    assert api.get_scripts() == {"txt2img": [], "img2img": []}
    assert api.get_embeddings() == {"loaded": {}, "skipped": {}} and api.get_cmd_flags() == {}
    assert [row["name"] for row in api.get_upscalers()] == ["None"]
    for names in ("hypernetworks", "face_restorers", "realesrgan_models", "prompt_styles", "sd_vae"):
        assert getattr(api, f"get_{names}")() == []
    assert isinstance(api.get_latent_upscale_modes(), list)
    for name in ("refresh-checkpoints", "unload-checkpoint", "reload-checkpoint"):
        answer = requests.post(f"{webui.url}/sdapi/v1/{name}", json="", timeout=PATIENCE)  # as textgen does
        assert answer.status_code == 200 and answer.json() is None
    missing = requests.get(f"{webui.url}/sdapi/v1/nothing", timeout=PATIENCE)
    assert missing.status_code == 404 and missing.json()["detail"] == "Not Found"


def test_the_documents_snippet_runs(webui: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(import webuiapi.*?)```", text, re.S)
    exec(code.replace("port=7860", f"port={webui.port}"), {})
    with Image.open("hat.png") as picture:
        assert picture.size == (128, 128)
