"""Settings that nobody here chose, such as those in a picture from elsewhere: their limits, and the files they name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from stable_diffusion.errors import InputError, shown
from stable_diffusion.generation.request import LOADING, PICTURES

LIMITS = {"num_inference_steps": 150, "width": 2048, "height": 2048, "num_images_per_prompt": 16}
"""The most that they may ask for; each of several prompts is a picture. What the user chooses has no such limit."""

LONGEST = 10_000
"""Letters of their prompts together; to read words by the million takes half a minute."""

FILES = (*(name for name in LOADING if name not in ("prediction_type", "variant", "ema")), "lora", *PICTURES)
"""Fields that name files."""


def check_stranger(fields: Mapping[str, Any]) -> None:
    """Raises InputError where fields that nobody here chose, such as a picture's, ask for more than ``LIMITS``."""
    pictures = len(fields.get("prompt", ("",))) * fields.get("num_images_per_prompt", 1)
    for name, value in {**fields, "num_images_per_prompt": pictures}.items():
        if name in LIMITS and value > LIMITS[name]:
            raise InputError(f"{name} may be at most {LIMITS[name]}, got {shown(value)}")
    for name in ("width", "height"):
        if (side := fields.get(name, 1) * fields.get("hires", 1)) > LIMITS[name]:
            raise InputError(f"{name} times hires may be at most {LIMITS[name]}, got {shown(side)}")
    texts = (*fields.get("prompt", ()), *fields.get("negative_prompt", ()), fields.get("mix_prompt") or "")
    if (letters := sum(map(len, texts))) > LONGEST:
        raise InputError(f"the prompts may have at most {LONGEST:,} letters, got {letters:,}")


def named_files(fields: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The fields that name files, each with a text that it has: of ``parse``, or as they came."""
    for name in FILES:
        value = fields.get(name)
        texts = value if isinstance(value, (list, tuple, Mapping)) else (value,)
        yield from ((name, text) for text in texts if isinstance(text, str))
