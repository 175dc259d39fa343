"""Real drawings, and scenes of them: eight of the icons, from the bottom rows of docs/first-pictures.png."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from stable_diffusion.data.cache import Array
from stable_diffusion.evaluation.ground import ground

NAMES = (
    "hamburger",
    "baby chick",
    "shinto shrine",
    "electric plug",
    "watermelon",
    "trolleybus",
    "anchor",
    "airplane departure",
)
_FILE = Path(__file__).parents[1] / "golden" / "drawings.png"


def drawings() -> Array:
    """On white, 128 pixels a side: ``8 h w 3``."""
    strip = np.asarray(Image.open(_FILE).convert("RGB"))
    return np.stack(np.split(strip, len(NAMES), axis=1))


@cache
def sprite(name: str) -> Image.Image:
    """One of them without its ground."""
    picture = drawings()[[NAMES.index(name)]]
    alpha = np.where(ground(picture, np.full((1, 3), 255, dtype=np.uint8)), 0, 255).astype(np.uint8)
    image = Image.fromarray(np.dstack([picture[0], alpha[0]]))
    return image.crop(image.getchannel("A").getbbox())


def scene(*things: tuple[str | Image.Image, int, int, int], ground: str = "white") -> Array:
    """Each thing's name, or its sprite, with left, top and longer side; uint8 ``128 128 3``."""
    picture = Image.new("RGBA", (128, 128), ground)
    for thing, left, top, side in things:
        cut = (sprite(thing) if isinstance(thing, str) else thing).copy()
        scale = side / max(cut.size)
        small = cut.resize((round(cut.width * scale), round(cut.height * scale)))
        picture.alpha_composite(small, (left, top))
    return np.asarray(picture.convert("RGB"))


def beside(names: Sequence[str | Image.Image], ground: str = "white") -> Array:
    """Two things left and right, three or four in two rows."""
    places = [(3, 34), (67, 34)] if len(names) == 2 else [(3, 3), (67, 3), (3, 67), (67, 67)]
    return scene(*((name, x, y, 58) for name, (x, y) in zip(names, places, strict=False)), ground=ground)
