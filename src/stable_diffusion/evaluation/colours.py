"""Which of eleven colours a thing in a picture has, by the pixels in its box.

The names are the basic colour terms of English (Berlin and Kay 1969). A pixel has the name of the nearest of a few
examples in OKLab (Ottosson 2020), a space in which distances are about those that people see.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np

from stable_diffusion.data.cache import Array
from stable_diffusion.data.oklab import to_oklab
from stable_diffusion.evaluation.ground import TOLERANCE
from stable_diffusion.evaluation.ground import colours as ground_colours

EXAMPLES = {
    "red": "ff0000 e0242b dd2e44 b71c1c c62828 f44336 a01010",
    "orange": "ff8c00 f4900c ff9800 f57c00 ffa733 e86a10",
    "yellow": "ffff00 ffcc4d ffeb3b fdd835 f9c23c ffe680",
    "green": "00a000 008000 77b255 5c913b 4caf50 2e7d32 7cb342 00c853 a5d66f 009688 1b5e20",
    "blue": "0000ff 1e6fd9 55acee 3b88c3 2196f3 0d47a1 81d4fa 00bcd4 1a237e 5c6bc0",
    "purple": "800080 9c27b0 7e57c2 aa8dd8 4a148c 9266cc 6a1b9a b388ff",
    "pink": "ffc0cb ff69b4 f4abba ec407a f48fb1 ff77bb e91e90",
    "brown": "8b4513 795548 5d4037 a0522d 8d5a3b 662113 a47551",
    "black": "000000 1a1a1a 292f33 303030",
    "white": "ffffff f2f2f2 e0e0e0",
    "grey": "808080 9aaab4 66757f b0b4b8 616161 999999",
}
"""Of each name, in sRGB."""
COLOURS = tuple(EXAMPLES)
GREYS = ("black", "white", "grey")

LIGHTNESS = 0.5
"""Weight of lightness against the two other axes: shadow and light change it most."""
ENOUGH = 0.45
"""Part of a thing's pixels that colours need together to win over black, white and grey."""
_LEVELS = 32  # of each channel, in the table of names


def thing_colours(picture: Array, boxes: Sequence[tuple[float, float, float, float]]) -> list[str]:
    """The colour of the thing in each box of a uint8 picture, ``h w 3``: one of ``COLOURS``.

    Pixels of the ground do not count, nor does the thing's edge, where it blends with the ground. The most frequent
    name wins, but black, white and grey only where other colours have less than ``ENOUGH`` of the pixels together:
    outlines, eyes and lights are no colour of a thing that has one.
    """
    things = np.abs(picture.astype(np.int16) - ground_colours(picture[None])[0]).max(2) > TOLERANCE
    inner = things.copy()
    for axis in (0, 1):
        for shift in (1, -1):
            inner &= np.roll(things, shift, axis)
    levels = picture.astype(np.int64) * _LEVELS // 256
    names = _table()[levels[..., 0], levels[..., 1], levels[..., 2]]
    return [_dominant(names, things, inner, box) for box in boxes]


def _dominant(names: Array, things: Array, inner: Array, box: tuple[float, float, float, float]) -> str:
    left, top, right, bottom = (round(side) for side in box)
    place = np.s_[max(top, 0) : max(bottom, top + 1), max(left, 0) : max(right, left + 1)]
    whole, most = things[place], inner[place]
    chosen = most if 3 * most.sum() >= whole.sum() > 0 else whole
    counts = np.bincount(
        names[place][chosen] if chosen.any() else names[place].ravel(), minlength=len(COLOURS)
    )
    grey = [COLOURS.index(name) for name in GREYS]
    if (rest := np.delete(counts, grey)).sum() >= ENOUGH * counts.sum():
        return [name for name in COLOURS if name not in GREYS][int(rest.argmax())]
    return COLOURS[int(counts.argmax())]


@cache
def _table() -> Array:
    """The name's number of every colour, by its red, green and blue in ``_LEVELS`` steps."""
    axis = (np.arange(_LEVELS) + 0.5) / _LEVELS
    points = to_oklab(np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1)).reshape(-1, 3)
    weights = np.array([LIGHTNESS, 1, 1])
    nearest = []
    for examples in EXAMPLES.values():
        rgb = np.array([list(bytes.fromhex(example)) for example in examples.split()]) / 255
        distances = np.linalg.norm((points[:, None] - to_oklab(rgb)[None]) * weights, axis=2)
        nearest.append(distances.min(1))
    return np.argmin(nearest, axis=0).reshape((_LEVELS,) * 3)
