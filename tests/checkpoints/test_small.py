"""Compressed and few-step Stable Diffusions: diffusers' latents, their cards' defaults, and what opens them whole."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from stable_diffusion import DiffusionModel, InputError
from stable_diffusion.checkpoints.info import describe
from stable_diffusion.cli import main
from stable_diffusion.config import TAESD
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


def own(model: DiffusionModel, prompt: str = "a fox", **settings: Any) -> torch.Tensor:
    """Ours with the model's own defaults, in one step where a sampler's own noise would differ."""
    noise = normal(1, 4, 8, 8, dtype=torch.float32)
    plain = {"num_inference_steps": None, "guidance_scale": None, "negative_prompt": ""}
    return ours(model, None, prompt=[prompt], latents=noise, **plain | settings)


def steps_of(model: DiffusionModel) -> int:
    """Steps to compare: those of 50 that show it, and of LCM, which adds noise of its own between steps, the first."""
    few = {50: 6}.get(model.config.num_inference_steps, model.config.num_inference_steps)
    return 1 if model.config.sampler.name == "lcm" else few


@pytest.mark.parametrize("kind", KINDS)
def test_latents_are_those_of_the_pipeline(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """With the defaults of the model's card; and again from our folder, and from what is exported, where diffusers
    opens it with the same class."""
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
    noise = [torch.randn(4, 8, 8, generator=drawn) for _ in range(4)][0][None]
    wanted = pipe(
        "a fox", latents=noise, guidance_scale=8.0, output_type="latent",
        generator=_after(torch.Generator().manual_seed(7), noise),
    ).images  # fmt: skip
    assert error(own(model, latents=None, seed=7), wanted) < TOLERANCE
    assert error(own(model, latents=None, seed=7, guidance_scale=7.9), wanted) > 10 * TOLERANCE
    assert error(own(model, latents=None, seed=7, guidance_interval=(0.0, 0.1)), wanted) < TOLERANCE


def _after(generator: torch.Generator, noise: torch.Tensor) -> torch.Generator:
    """The generator after it has drawn the noise that a walk begins with."""
    torch.randn(noise.shape, generator=generator)
    return generator


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


@pytest.mark.parametrize("kind", ["bk-sdm-base", "bk-sdm-small", "bk-sdm-tiny", "bk-sdm-v2-tiny"])
def test_single_files_of_compressed_models(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """Written with the blocks counted on, and read from the names that diffusers' script gives, which leave gaps."""
    model = DiffusionModel.from_pretrained(folders[kind])
    path = tmp_path / "one.safetensors"
    model.export(path, format="single-file")
    assert torch.equal(own(DiffusionModel.from_pretrained(path), sampler="ddim"), own(model, sampler="ddim"))


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
