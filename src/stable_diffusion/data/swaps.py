"""Captions whose two colours changed places: the same words, of another picture."""

from __future__ import annotations

import re

from stable_diffusion.data.icon_captions import STYLES
from stable_diffusion.data.icon_scenes import COLOURS

_ANY = "|".join((*COLOURS, "gray"))
_COLOUR = re.compile(rf"\b(?:an? )?({_ANY})\b")
_ONE_THING = re.compile(
    "|".join([rf"\b(?:{_ANY}) and (?:{_ANY})\b", *(style.look for style in STYLES.values())])
)
"""Where a colour belongs to a style, or two of them to one thing."""


def swapped(caption: str) -> str | None:
    """The caption with each of its two colours in the other's place; None for one of fewer or of more colours.

    "a red drum and an orange fox" becomes "an orange drum and a red fox".
    """
    spared = [match.span() for match in _ONE_THING.finditer(caption)]
    found = [
        match
        for match in _COLOUR.finditer(caption)
        if not any(start <= match.start(1) < end for start, end in spared)
    ]
    colours = [*dict.fromkeys(match[1] for match in found)]
    if len(colours) != 2:
        return None
    other = dict(zip(colours, reversed(colours), strict=True))
    said, end = "", 0
    for match in found:
        colour = other[match[1]]
        article = "" if match[0] == match[1] else "an " if colour == "orange" else "a "
        said += caption[end : match.start()] + article + colour
        end = match.end()
    return said + caption[end:]
