"""Reading and writing models. ``read`` tells the formats apart by their content."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from stable_diffusion.checkpoints import diffusers, families, hub, native, single_file, taesd
from stable_diffusion.checkpoints.checkpoint import Checkpoint
from stable_diffusion.checkpoints.files import is_weights
from stable_diffusion.config import ModelConfig, from_dict
from stable_diffusion.errors import InputError, unknown_name
from stable_diffusion.files import check_place, is_file, writing

__all__ = ["Checkpoint", "export", "found", "read"]


def read(
    path: str | Path, *, vae: str | None = None, text_encoder: str | None = None, **reading: Any
) -> Checkpoint:
    """The whole model at `path`, with the parts that are given in place of its own or where it has none.

    Args:
        path: as ``found`` takes it.
        vae: an autoencoder (see ``taesd.read_vae``).
        text_encoder: the folder of a CLIP text encoder (see ``diffusers.read_text_encoder``).
        reading: the other arguments of ``found``.

    Raises:
        InputError: as ``found`` does; likewise for the parts; the model has no such part, or another one's width.
    """
    checkpoint = found(path, **reading)
    config = checkpoint.config
    if vae is not None:
        config, state = taesd.with_vae(Path(vae), config)
        checkpoint = replace(checkpoint, config=config, vae=state)
    if text_encoder is not None:
        text, state, tokenizer = diffusers.read_text_encoder(Path(text_encoder))
        families.check_width(text_encoder, text.hidden_size, config.unet.cross_attention_dim)
        config = replace(config, text_encoders=(text,))
        checkpoint = replace(checkpoint, config=config, text_encoders=[state], tokenizers=[tokenizer])
    if missing := checkpoint.missing:
        said = f"{path} has no {' and no '.join(missing)}: to generate or export add"
        raise InputError(
            f"{said} {' and '.join(ADD[part][0] for part in missing)}",
            f"{said} {' and '.join(ADD[part][1] for part in missing)}",
        )
    return checkpoint


ADD = {"autoencoder": ("vae", "--vae FILE"), "text encoder": ("text_encoder", "--text-encoder FOLDER")}
"""What a model without such a part needs: the argument in Python, and the command's option."""


def found(
    path: str | Path, *, prediction_type: str | None = None, variant: str | None = None, ema: bool = False
) -> Checkpoint:
    """The model at `path`, which may lack its autoencoder or its text encoder.

    Args:
        path: a folder, ours or diffusers', or a single file in CompVis' layout; the text ``owner/name``, where no such
            path is here, is a name of the Hugging Face hub.
        prediction_type: what the U-Net predicts, whatever the files say; None lets them say it.
        variant: diffusers folders: files to prefer, such as ``fp16`` or ``non_ema``.
        ema: single files: whether to take the averaged weights where there are both.

    Raises:
        InputError: there is nothing at `path`, or nothing that can be read as a model.
    """
    path = hub.find(path, variant=variant)
    if diffusers.is_diffusers(path):
        checkpoint = diffusers.read(path, variant=variant)
    elif native.is_native(path):
        checkpoint = native.read(path)
    elif is_file(path) and is_weights(path):
        return single_file.read(path, prediction_type=prediction_type, ema=ema)
    else:
        raise InputError(
            f"{path} is not a model: give a folder that has config.json (ours) or model_index.json (diffusers), or a"
            " file of weights (.safetensors, .ckpt)"
        )
    if prediction_type is None:
        return checkpoint
    asked = {"schedule": {"prediction_type": prediction_type}}
    config = from_dict(ModelConfig, asked, base=checkpoint.config)
    others = (note for note in checkpoint.notes if not note.startswith("The U-Net predicts "))
    notes = (f"The U-Net predicts {prediction_type}: it was asked for.", *others)
    return replace(checkpoint, config=config, notes=notes)


def export(path: Path, checkpoint: Checkpoint, format: str, dtype: torch.dtype | None) -> tuple[str, ...]:
    """Writes a model for other programs, as ``DiffusionModel.export`` says; returns notes for the user."""
    check_export(path, format)
    if format == "diffusers":
        return diffusers.write(path, checkpoint, dtype)
    single_file.write(path, checkpoint, dtype)
    return ()


def check_export(path: Path, format: str) -> None:
    """Raises InputError where no model can be exported in that format: a place that is taken, or cannot be written."""
    if format not in ("diffusers", "single-file"):
        raise unknown_name("format", format, ("diffusers", "single-file"))
    if format == "single-file" and path.suffix != ".safetensors":
        raise InputError(f"a single file ends in .safetensors, got {path}")
    with writing(path):
        if os.path.lexists(path) and not (
            format == "diffusers" and path.is_dir() and not any(path.iterdir())
        ):
            raise InputError(f"{path} exists: choose another name")
    check_place(path, is_folder=True)
