"""Sizes of pictures: those that a model can make, and the one that it makes unless told otherwise."""

from __future__ import annotations

import math

from PIL import Image

from stable_diffusion.config import ModelConfig
from stable_diffusion.errors import InputError

SEVERAL_SIZES = 512
"""Pixels a side from which models, Stable Diffusion, are also good at larger pictures than they were trained on."""


def check_size(config: ModelConfig, width: int, height: int) -> None:
    """Raises InputError unless both are multiples of the model's factor."""
    factor = config.vae.factor
    for name, value in (("width", width), ("height", height)):
        if value % factor:
            below, above = value // factor * factor, (value // factor + 1) * factor
            nearest = f"nearest are {below} and {above}" if below else f"the smallest is {above}"
            raise InputError(f"{name} must be a multiple of {factor}, got {value}; {nearest}")


def default_size(config: ModelConfig, picture: Image.Image | None) -> dict[str, int]:
    """The picture's size, or the model's own; far too large ones at the model's area."""
    factor, own = config.vae.factor, config.sample_size
    width, height = (own, own) if picture is None else picture.size
    if picture is not None:
        if width * height > 4 * own**2:  # the model knows no such size, and it is slow
            scale = own / math.sqrt(width * height)
            width, height = (max(factor, round(side * scale)) for side in (width, height))
        width, height = (max(factor, side // factor * factor) for side in (width, height))
    return {"width": width, "height": height}
