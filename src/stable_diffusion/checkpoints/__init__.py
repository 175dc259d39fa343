"""Reading and writing models. ``read`` tells the formats apart by their content."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from stable_diffusion.checkpoints import compvis, diffusers, hub, native
from stable_diffusion.checkpoints.checkpoint import Checkpoint, is_weights
from stable_diffusion.config import ScheduleConfig, from_dict
from stable_diffusion.errors import InputError

__all__ = ["Checkpoint", "read"]


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
    if not Path(path).exists():
        if not hub.is_name(path):
            raise InputError(f"{path} does not exist: give a model folder")
        path = hub.fetch(Path(path).as_posix(), variant=variant)
    path = Path(path)
    if diffusers.is_diffusers(path):
        checkpoint = diffusers.read(path, variant=variant)
    elif native.is_native(path):
        checkpoint = native.read(path)
    elif compvis.is_single_file(path) and is_weights(path):
        return compvis.read(path, prediction_type=prediction_type, ema=ema)
    else:
        raise InputError(
            f"{path} is no model folder: it has neither config.json (ours) nor model_index.json (diffusers)"
        )
    if prediction_type is None:
        return checkpoint
    schedule = from_dict(
        ScheduleConfig, {"prediction_type": prediction_type}, base=checkpoint.config.schedule
    )
    others = tuple(note for note in checkpoint.notes if not note.startswith("The U-Net predicts "))
    return replace(
        checkpoint,
        config=replace(checkpoint.config, schedule=schedule),
        notes=(f"The U-Net predicts {prediction_type}: it was asked for.", *others),
    )
