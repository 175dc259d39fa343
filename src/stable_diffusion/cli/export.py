"""``minisd export``: a model for other programs."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Literal

import tyro

from stable_diffusion.cli.show import say


def export(
    model: tyro.conf.Positional[str],
    out: tyro.conf.Positional[Path],
    *,
    format: Literal["diffusers", "single-file"] = "diffusers",
    half: bool = False,
    prediction_type: str | None = None,
    variant: str | None = None,
    ema: bool = False,
    vae: str | None = None,
    text_encoder: str | None = None,
) -> None:
    """Write a model for other programs, and print its path. What diffusers' pipeline cannot hold goes by parts.

    Args:
        model: A model folder, a single file or a hub name (owner/name).
        out: The folder or the .safetensors file to write; nothing is ever overwritten.
        format: diffusers: a folder for StableDiffusionPipeline; single-file: CompVis' layout.
        half: Write 16-bit numbers, which halves the files.
        prediction_type: What the U-Net predicts (epsilon, v_prediction), whatever the files say.
        variant: Diffusers folders: files to prefer, such as fp16 or non_ema.
        ema: Single files: take the averaged weights where there are both.
        vae: Another autoencoder, for a model that has none or instead of its own.
        text_encoder: The folder of another CLIP text encoder, likewise.
    """
    import torch

    from stable_diffusion import DiffusionModel
    from stable_diffusion.checkpoints import check_export

    check_export(out, format)
    loaded = DiffusionModel.from_pretrained(
        model, prediction_type=prediction_type, variant=variant, ema=ema, vae=vae, text_encoder=text_encoder
    )
    for note in loaded.notes:
        warnings.warn(note, stacklevel=1)
    loaded.export(out, format=format, dtype=torch.float16 if half else None)
    say(out)
