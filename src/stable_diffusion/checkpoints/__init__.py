"""Reading and writing models. ``read`` tells the formats apart by their content."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch

from stable_diffusion.checkpoints import diffusers, hub, native, single_file
from stable_diffusion.checkpoints.checkpoint import Checkpoint
from stable_diffusion.checkpoints.files import is_weights
from stable_diffusion.config import ModelConfig, from_dict
from stable_diffusion.errors import InputError, unknown_name
from stable_diffusion.files import check_place, exists, is_file, tidy

__all__ = ["Checkpoint", "export", "read"]


def read(
    path: str | Path, *, prediction_type: str | None = None, variant: str | None = None, ema: bool = False
) -> Checkpoint:
    """The model at `path`: a folder, ours or diffusers', a single file in CompVis' layout, or a hub name.

    Args:
        path: what to read; ``owner/name``, where no such path is here, is a name of the Hugging Face hub.
        prediction_type: what the U-Net predicts, whatever the files say; None lets them say it.
        variant: diffusers folders: files to prefer, such as ``fp16`` or ``non_ema``.
        ema: single files: whether to take the averaged weights where there are both.

    Raises:
        InputError: there is nothing at `path`, or nothing that can be read as a model.
    """
    tidy(Path(path))  # a process was killed, perhaps, as it replaced the model
    if not exists(Path(path)):
        if not hub.is_name(path):
            raise InputError(f"{path} does not exist: give a model folder")
        path = hub.fetch(Path(path).as_posix(), variant=variant)
    path = Path(path)
    if diffusers.is_diffusers(path):
        checkpoint = diffusers.read(path, variant=variant)
    elif native.is_native(path):
        checkpoint = native.read(path)
    elif is_file(path) and is_weights(path):
        return single_file.read(path, prediction_type=prediction_type, ema=ema)
    else:
        raise InputError(
            f"{path} is not a model folder: it has neither config.json (ours) nor model_index.json (diffusers)"
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
    check_place(path, is_folder=True)
    if os.path.lexists(path) and not (format == "diffusers" and path.is_dir() and not any(path.iterdir())):
        raise InputError(f"{path} exists: choose another name")
