"""Settings that nobody here chose, such as those in a picture from elsewhere: what they may ask for, and which files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from stable_diffusion.errors import InputError, shown
from stable_diffusion.generation.request import LIMITS, LOADING, PICTURES

FILES = (*(name for name in LOADING if name not in ("prediction_type", "variant", "ema")), "lora", *PICTURES)
"""Fields that name files."""


def check_stranger(fields: Mapping[str, Any]) -> None:
    """Raises InputError where fields that nobody here chose, such as a picture's, ask for more than ``LIMITS``."""
    pictures = len(fields.get("prompt", ("",))) * fields.get("num_images_per_prompt", 1)
    for name, value in {**fields, "num_images_per_prompt": pictures}.items():
        if name in LIMITS and value > LIMITS[name][0]:
            raise InputError(f"{name} may be at most {LIMITS[name][0]} there, got {shown(value)}")


def named_files(fields: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The fields that name files, each with a text that it has: of ``parse``, or as they came."""
    for name in FILES:
        value = fields.get(name)
        texts = value if isinstance(value, (list, tuple, Mapping)) else (value,)
        yield from ((name, text) for text in texts if isinstance(text, str))
