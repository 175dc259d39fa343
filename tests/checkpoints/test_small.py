"""Compressed and few-step Stable Diffusions: diffusers' latents, their cards' defaults, and what opens them whole."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from stable_diffusion import DiffusionModel, InputError
from stable_diffusion.checkpoints.info import describe
from stable_diffusion.cli import main
from stable_diffusion.config import UNetConfig
from stable_diffusion.generation.metadata import read_settings
from tests.checkpoints import sd
from tests.checkpoints.test_diffusers import TOLERANCE, error, ours
from tests.nn.reference import normal, quietly

TINY_TYPES = ("CrossAttnDownBlock2D",) * 3
SDXS_TYPES = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
SECOND = {"use_linear_projection": True, "attention_head_dim": [2, 4, 8], "cross_attention_dim": 32}
FIRST = {"attention_head_dim": 8}
LCM = {"_class_name": "LCMScheduler", "set_alpha_to_one": True, "timestep_spacing": "leading"}
TRAILING = {
    "_class_name": "EulerDiscreteScheduler",
    "timestep_spacing": "trailing",
    "interpolation_type": "linear",
}
TAESD_SMALL = {
    **dict.fromkeys(("encoder_block_out_channels", "decoder_block_out_channels"), (8, 8, 8)),
    **{"num_encoder_blocks": (1, 1, 2), "num_decoder_blocks": (3, 2, 1)},
}
# Of each published model what sets its folder apart, with its widths small; steps and scale are its card's.
KINDS: dict[str, dict[str, Any]] = {
    "bk-sdm-base": {"unet": {**FIRST, "layers_per_block": 1}},
    "bk-sdm-small": {"unet": {**FIRST, "layers_per_block": 1, "mid_block_type": None}},
    "bk-sdm-tiny": {
        "unet": {**FIRST, "layers_per_block": 1, "mid_block_type": None, "down_block_types": TINY_TYPES}
    },
    "bk-sdm-v2-tiny": {
        "unet": {**SECOND, "layers_per_block": 1, "mid_block_type": None, "down_block_types": TINY_TYPES},
        "second": True,
    },
    "sdxs": {
        "unet": {**SECOND, "layers_per_block": 1, "mid_block_type": None, "down_block_types": SDXS_TYPES},
        "vae": TAESD_SMALL,
        "scheduler": {"_class_name": "DPMSolverMultistepScheduler"},
        "defaults": (1, 1.0),
        "second": True,
    },
    "sd-turbo": {
        "unet": {**SECOND, "upcast_attention": None},
        "scheduler": TRAILING,
        "defaults": (1, 1.0),
        "second": True,
    },
    "lcm": {
        "unet": {**FIRST, "time_cond_proj_dim": 256},
        "scheduler": LCM,
        "pipeline": "LatentConsistencyModelPipeline",
        "defaults": (4, 8.0),
    },
    "lcm-lora-merged": {"unet": FIRST, "scheduler": LCM, "defaults": (4, 1.0)},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root, made = tmp_path_factory.mktemp("small"), {}
    for kind, given in KINDS.items():
        second = given.get("second", False)
        text = {**sd.TINY_TEXT, "hidden_act": "gelu" if second else "quick_gelu"}
        made[kind] = sd.build(
            root / kind,
            sd.TINY_UNET | given["unet"],
            given.get("vae", sd.TINY_VAE),
            text,
            sd.SCHEDULER | given.get("scheduler", {}),
            second=second,
            pipeline=given.get("pipeline", "StableDiffusionPipeline"),
        )
    return made


def theirs(folder: Path, steps: int, scale: float, prompt: str = "a fox") -> torch.Tensor:
    """The latents of the pipeline that the folder names."""
    pipe = quietly(diffusers.DiffusionPipeline.from_pretrained, folder)
    pipe.set_progress_bar_config(disable=True)
    noise = normal(1, 4, 8, 8, dtype=torch.float32)
    torch.manual_seed(0)
    return pipe(
        prompt, num_inference_steps=steps, guidance_scale=scale, latents=noise, output_type="latent"
    ).images


def test_the_picture_of_the_light_autoencoder(folders: dict[str, Path]) -> None:
    pipe = quietly(diffusers.DiffusionPipeline.from_pretrained, folders["sdxs"])
    pipe.set_progress_bar_config(disable=True)
    noise = normal(1, 4, 8, 8, dtype=torch.float32)
    (there,) = pipe("a fox", num_inference_steps=1, guidance_scale=0.0, latents=noise).images
    (here,) = DiffusionModel.from_pretrained(folders["sdxs"]).generate("a fox", latents=noise)
    wanted, found = (np.asarray(image, dtype=int) for image in (there, here))
    assert wanted.std() > 5
    assert np.abs(found - wanted).max() <= 1


def own(model: DiffusionModel, prompt: str = "a fox", **settings: Any) -> torch.Tensor:
    """Ours with the model's own defaults, in one step where a sampler's own noise would differ."""
    noise = normal(1, 4, 8, 8, dtype=torch.float32)
    plain = {"num_inference_steps": None, "guidance_scale": None, "negative_prompt": "", "latents": noise}
    return ours(model, settings.pop("sampler", None), prompt=[prompt], **plain | settings)


def steps_of(model: DiffusionModel) -> int:
    """Steps to compare: those of 50 that show it, and of LCM, which adds noise of its own between steps, the first."""
    few = {50: 6}.get(model.config.num_inference_steps, model.config.num_inference_steps)
    return 1 if model.config.sampler.name == "lcm" else few


@pytest.mark.parametrize("kind", KINDS)
def test_latents_are_those_of_the_pipeline(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """With the defaults of the model's card; and again from our folder, and there from what is exported."""
    model = DiffusionModel.from_pretrained(folders[kind])
    defaults = KINDS[kind].get("defaults", (50, 7.5))
    assert (model.config.num_inference_steps, model.config.guidance.scale) == defaults
    settings = {"num_inference_steps": steps_of(model)}
    wanted = theirs(folders[kind], *settings.values(), defaults[1])
    assert error(own(model, **settings), wanted) < TOLERANCE
    assert error(own(model, "a dog", **settings), wanted) > 10 * TOLERANCE
    if kind != "bk-sdm-base":
        other = own(model, guidance_scale=defaults[1] + 2, **settings)
        assert error(other, wanted) > 10 * TOLERANCE, "the scale counts"
    model.save_pretrained(tmp_path / "ours")
    again = DiffusionModel.from_pretrained(tmp_path / "ours")
    assert again.config == model.config
    assert torch.equal(own(again, **settings), own(model, **settings))
    again.export(tmp_path / "out")
    index = [json.loads((f / "model_index.json").read_text()) for f in (folders[kind], tmp_path / "out")]
    assert index[0]["_class_name"] == index[1]["_class_name"]
    assert error(theirs(tmp_path / "out", *settings.values(), defaults[1]), wanted) < TOLERANCE
    there = DiffusionModel.from_pretrained(tmp_path / "out").config
    assert (there.unet, there.vae, there.guidance) == (
        model.config.unet,
        model.config.vae,
        model.config.guidance,
    )


def test_the_steps_of_latent_consistency_models(folders: dict[str, Path]) -> None:
    """All four steps, of a scheduler that adds our noise; the scale is read at each."""
    model = DiffusionModel.from_pretrained(folders["lcm"])
    pipe = quietly(diffusers.LatentConsistencyModelPipeline.from_pretrained, folders["lcm"])
    pipe.set_progress_bar_config(disable=True)
    drawn = torch.Generator().manual_seed(7)
    noise = torch.randn(1, 4, 8, 8, generator=drawn)
    wanted = pipe("a fox", latents=noise, guidance_scale=8.0, output_type="latent", generator=drawn).images
    assert error(own(model, latents=None, seed=7), wanted) < TOLERANCE
    assert error(own(model, latents=None, seed=7, guidance_scale=7.9), wanted) > 10 * TOLERANCE
    assert error(own(model, latents=None, seed=7, guidance_interval=(0.0, 0.1)), wanted) < TOLERANCE


def test_a_negative_prompt_without_effect_is_said(folders: dict[str, Path]) -> None:
    model = DiffusionModel.from_pretrained(folders["lcm"])
    with pytest.warns(UserWarning, match="the negative prompt has no effect"):
        model.generate("a fox", "a dog", num_inference_steps=1)


def test_info_says_what_tells_a_few_step_model(folders: dict[str, Path]) -> None:
    def lines(kind: str) -> str:
        return "\n".join(describe(folders[kind]))

    assert "By default 4 steps: its U-Net reads its guidance" in lines("lcm")
    assert "By default 1 step: its scheduler (Euler, trailing, epsilon) is SD-Turbo's" in lines("sd-turbo")
    assert "by default 1 steps of dpmpp_2m, guidance 1.0" in lines("sdxs")
    assert "By default" not in lines("bk-sdm-tiny")


def scripted(config: UNetConfig, name: str) -> str:
    """CompVis' name of a compressed model's tensor as diffusers' script gives it: three blocks a level."""
    prefix = "model.diffusion_model."
    if not (match := re.fullmatch(rf"{prefix}(input|output)_blocks\.(\d+)\.(\d)\.(.*)", name)):
        return name
    n, k, rest = int(match[2]), int(match[3]), match[4]
    if match[1] == "input":
        n = (
            n
            if n == 0
            else 3 * ((n - 1) // 2) + (n - 1) % 2 + 1
            if not rest.startswith("op.")
            else n // 2 * 3
        )
        return f"{prefix}input_blocks.{n}.{k}.{rest}"
    i, j = divmod(n, 2)
    if rest.startswith("conv."):
        return f"{prefix}output_blocks.{3 * i + 2}.{1 if i == 0 else 2}.{rest}"
    if i == 0 and k == 1:
        return f"{prefix}up_blocks.0.attentions.{j}.{rest}"
    return f"{prefix}output_blocks.{3 * i + j}.{k}.{rest}"


@pytest.mark.parametrize("kind", ["bk-sdm-base", "bk-sdm-small", "bk-sdm-tiny", "bk-sdm-v2-tiny"])
def test_single_files_of_compressed_models(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """Written with the blocks counted on, and read from the names that diffusers' script gives, which leave gaps."""
    model = DiffusionModel.from_pretrained(folders[kind])
    path = tmp_path / "one.safetensors"
    model.export(path, format="single-file")
    state = load_file(path)
    gaps = {scripted(model.config.unet, name): tensor for name, tensor in state.items()}
    save_file(gaps, tmp_path / "gaps.safetensors")
    assert (len(gaps), gaps.keys() == state.keys()) == (len(state), False)
    for file in (path, tmp_path / "gaps.safetensors"):
        read = DiffusionModel.from_pretrained(file)
        unet, told = model.config.unet, read.config.unet
        untold = {"num_attention_heads": unet.num_attention_heads, "norm_num_groups": unet.norm_num_groups}
        assert replace(told, **untold) == unet
        assert all(torch.equal(t, read.state_dict()[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("sdxs", "no names for its light autoencoder"), ("lcm", "no names for a U-Net that reads its guidance")],
)
def test_what_a_single_file_has_no_names_for(
    kind: str, reason: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=reason):
        DiffusionModel.from_pretrained(folders[kind]).export(tmp_path / "x.safetensors", format="single-file")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def whole(folders: dict[str, Path]) -> tuple[DiffusionModel, Path]:
    """A compressed model, and its U-Net alone in a single file beside its folder."""
    model = DiffusionModel.from_pretrained(folders["bk-sdm-small"])
    model.export(folders["bk-sdm-small"].parent / "whole.safetensors", format="single-file")
    state = load_file(folders["bk-sdm-small"].parent / "whole.safetensors")
    path = folders["bk-sdm-small"].parent / "unet.safetensors"
    save_file({n: t for n, t in state.items() if n.startswith("model.")}, path)
    return model, path


@pytest.mark.parametrize("form", ["file", "unet folder", "unet alone", "index without parts"])
def test_a_model_without_autoencoder_and_text_encoder_says_what_to_add(
    form: str, whole: tuple[DiffusionModel, Path], folders: dict[str, Path], tmp_path: Path
) -> None:
    """One sentence from the library and the command; with the parts beside it, the very model."""
    model, path = whole
    folder = folders["bk-sdm-small"]
    if form == "unet alone":
        path = Path(shutil.copytree(folder / "unet", tmp_path / "lone"))
    elif form != "file":
        path = tmp_path / "lone"
        shutil.copytree(folder / "unet", path / "unet")
    if form == "index without parts":
        shutil.copy(folder / "model_index.json", path)
        shutil.copytree(folder / "scheduler", path / "scheduler")
    with pytest.raises(
        InputError,
        match=r"has no autoencoder and no text encoder: to generate or export add vae and text_encoder$",
    ):
        DiffusionModel.from_pretrained(path)
    with pytest.raises(InputError, match=r"has no text encoder: to generate or export add text_encoder$"):
        DiffusionModel.from_pretrained(path, vae=folder)
    lines = "\n".join(describe(path))
    assert form == "file" or "  no autoencoder: add --vae FILE\n  no text encoder: add" in lines
    read = DiffusionModel.from_pretrained(path, vae=folder, text_encoder=folder)
    assert read.origin["text_encoder"] == str(folder)
    assert all(torch.equal(t, read.state_dict()[name]) for name, t in model.state_dict().items())
    assert torch.equal(read.encode_prompt("a fox!").tokens, model.encode_prompt("a fox!").tokens)
    if form != "file":  # no shape tells the groups of its norms
        assert error(own(read, num_inference_steps=3), own(model, num_inference_steps=3)) < 1e-6


def test_a_file_without_one_part(whole: tuple[DiffusionModel, Path], folders: dict[str, Path]) -> None:
    model, path = whole
    state = load_file(path.with_name("whole.safetensors"))
    for start, given in (("first_stage_model.", "vae"), ("cond_stage_model.", "text_encoder")):
        part = path.with_name(f"no-{given}.safetensors")
        save_file({name: tensor for name, tensor in state.items() if not name.startswith(start)}, part)
        with pytest.raises(InputError, match=f"add {given}"):
            DiffusionModel.from_pretrained(part)
        assert f"add --{given.replace('_', '-')}" in "\n".join(describe(part))
        read = DiffusionModel.from_pretrained(part, **{given: folders["bk-sdm-small"]})
        assert all(torch.equal(t, read.state_dict()[name]) for name, t in model.state_dict().items())


def test_text_encoders_as_they_are_published(
    whole: tuple[DiffusionModel, Path], folders: dict[str, Path], tmp_path: Path
) -> None:
    """In a folder of its own with or without the tokenizer, and within a whole CLIP."""
    model, path = whole
    tokens = model.encode_prompt("Ein Bär!").tokens
    text = Path(shutil.copytree(folders["bk-sdm-small"] / "text_encoder", tmp_path / "text"))

    def found() -> torch.Tensor:
        return (
            DiffusionModel.from_pretrained(path, vae=folders["lcm"], text_encoder=text)
            .encode_prompt("Ein Bär!")
            .tokens
        )

    assert torch.equal(found(), tokens)
    shutil.copytree(folders["bk-sdm-small"] / "tokenizer", text, dirs_exist_ok=True)
    assert torch.equal(found(), tokens)
    settings = json.loads((text / "config.json").read_text(encoding="utf-8"))
    clip = {"model_type": "clip", "text_config": settings, "vision_config": {}}
    (text / "config.json").write_text(json.dumps(clip), encoding="utf-8")
    vision = {"vision_model.post_layernorm.weight": torch.ones(3), "logit_scale": torch.ones(())}
    save_file(load_file(text / "model.safetensors") | vision, text / "model.safetensors")
    assert torch.equal(found(), tokens)
    for content, message in (
        ({"model_type": "t5"}, "is not the configuration of a CLIP text encoder"),
        (
            settings | {"hidden_size": 64},
            "this file is for a model of width 64, the model is a model of width 32",
        ),
        (settings | {"num_hidden_layers": 5}, "do not fit"),
    ):
        (text / "config.json").write_text(json.dumps(content), encoding="utf-8")
        with pytest.raises(InputError, match=message) as caught:
            found()
        assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:The U-Net predicts", "ignore:.* names the (model|vae|text_encoder)")
def test_the_commands_take_the_parts(
    whole: tuple[DiffusionModel, Path],
    folders: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A picture made from parts says them, and is made again from what it says; export writes the model whole."""
    folder, path = folders["bk-sdm-small"], whole[1]
    parts = ["--vae", str(folder), "--text-encoder", str(folder)]
    with pytest.raises(SystemExit) as caught:
        main(["generate", "a fox", "--model", str(path), "--steps", "2", "--output", str(tmp_path)])
    assert caught.value.code == 2
    assert "add --vae FILE and --text-encoder FOLDER" in capsys.readouterr().err
    out = ["--size", "32", "--output", str(tmp_path)]
    main(["generate", "a fox", "--model", str(path), "--steps", "2", "--seed", "1", *parts, *out])
    (picture,) = tmp_path.glob("*.png")
    assert read_settings(picture)["text_encoder"] == str(folder)
    main(["generate", "--from", str(picture), *out])
    first, second = sorted(tmp_path.glob("*.png"))
    assert Image.open(first).tobytes() == Image.open(second).tobytes()
    main(["export", str(path), str(tmp_path / "out"), *parts])
    assert quietly(diffusers.StableDiffusionPipeline.from_pretrained, tmp_path / "out").unet.mid_block is None
