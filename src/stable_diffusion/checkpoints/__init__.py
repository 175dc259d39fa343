"""Reading and writing models. ``read`` tells the formats apart by their content."""

from __future__ import annotations

from pathlib import Path

from stable_diffusion.checkpoints import diffusers, native
from stable_diffusion.checkpoints.checkpoint import Checkpoint
from stable_diffusion.errors import InputError

__all__ = ["Checkpoint", "read"]


def read(path: str | Path) -> Checkpoint:
    """The model at `path`: one of our folders, or a diffusers folder of Stable Diffusion 1.x or 2.x.

    Raises:
        InputError: there is nothing at `path`, or nothing that can be read as a model.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path} does not exist: give a model folder")
    if diffusers.is_diffusers(path):
        return diffusers.read(path)
    if native.is_native(path):
        return native.read(path)
    raise InputError(
        f"{path} is no model folder: it has neither config.json (ours) nor model_index.json (diffusers)"
    )
