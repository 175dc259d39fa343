"""What people and files give for a field of a request, as the field has it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stable_diffusion.errors import InputError, shown
from stable_diffusion.fields import typed


def texts(name: str, value: Any) -> tuple[str, ...]:
    """One text or several. Raises InputError, naming the field, for none and for anything else."""
    given = (value,) if isinstance(value, str) else value
    if not isinstance(given, (list, tuple)) or not given or not all(isinstance(text, str) for text in given):
        raise InputError(f"{name} must be a text or a list of texts, got {shown(value)}")
    return tuple(given)


def split_file(text: str) -> tuple[str, str | None]:
    """A file, and what follows its last colon; a colon of the file's name, or after a drive's letter, stays there."""
    drive = 2 if re.match(r"[A-Za-z]:[\\/]", text) else 0
    file, colon, rest = text[drive:].rpartition(":")
    return (text, None) if not colon or Path(text).exists() else (text[:drive] + file, rest)


def weights(lora: object) -> dict[str, float]:
    """The weights of names, from a JSON object or from texts such as FILE and FILE:0.8; equal names add up."""
    if isinstance(lora, Mapping) and all(isinstance(name, str) for name in lora):
        pairs = list(lora.items())
    elif isinstance(lora, (list, tuple)) and all(isinstance(text, str) for text in lora):
        pairs = [split_file(text) for text in lora]
    else:
        raise InputError(f"lora must give the weight of each name, got {shown(lora)}")
    found: dict[str, float] = {}
    for name, said in pairs:
        try:
            weight = 1.0 if said is None else float(said)
        except (TypeError, ValueError, OverflowError):
            raise InputError(
                f"lora must be NAME or NAME:WEIGHT such as {name[:80]}:0.8, got {shown(said)}"
            ) from None
        found[name] = found.get(name, 0.0) + typed(float, weight, f"the weight of the LoRA {shown(name)}")
    return found
