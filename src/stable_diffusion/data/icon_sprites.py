"""Drawings with their transparency: turned to a colour, and put together to scenes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from stable_diffusion.data.icon_scenes import Part, Place, Scene
from stable_diffusion.data.oklab import from_oklab, to_oklab

Pixels = npt.NDArray[Any]
Box = tuple[int, int, int, int]
"""Left, top, width and height in pixels."""

ANCHORS: dict[str, tuple[float, float, float]] = {
    "red": (0.57, 0.22, 27),
    "orange": (0.74, 0.17, 58),
    "yellow": (0.90, 0.18, 100),
    "green": (0.65, 0.19, 143),
    "blue": (0.58, 0.19, 256),
    "purple": (0.52, 0.21, 308),
    "pink": (0.80, 0.13, 354),
    "brown": (0.45, 0.09, 52),
    "black": (0.19, 0.0, 0),
    "white": (0.96, 0.0, 0),
    "grey": (0.63, 0.0, 0),
}
"""What a colour's name means: lightness from 0 to 1, chroma, and hue in degrees, in OKLCh (Ottosson 2020)."""

_SHOWS = 0.4  # part of a drawing that has to turn, for its colour to be said
_OUTLINE = 0.3  # lightness below which neutral pixels are outlines and eyes


class Region(NamedTuple):
    """What of a drawing is turned to another colour."""

    weight: Pixels
    """Of each pixel, from 0 to 1."""
    lightness: float
    """Its mean."""
    hue: float | None
    """In degrees; None for a region without one."""


def can_turn(sprite: Image.Image) -> bool:
    """Whether enough of a drawing turns to another colour for its name to be true."""
    small = sprite.copy()
    small.thumbnail((48, 48))
    pixels, alpha = _pixels(small)
    return bool((_region(pixels, alpha).weight * alpha).sum() >= _SHOWS * alpha.sum())


def turned(sprite: Image.Image, colour: str) -> Image.Image:
    """The drawing with its main colour moved to one of ``ANCHORS``; shades, outlines and other colours stay."""
    pixels, alpha = _pixels(sprite)
    region = _region(pixels, alpha)
    lightness, chroma, hue = ANCHORS[colour]
    depth = 0.45 if colour in ("black", "white") else 0.75
    new_l = np.clip(lightness + depth * (pixels[..., 0] - region.lightness), 0.03, 0.99)
    # Shades near black and white have little chroma.
    new_c = chroma * np.clip(1 - 1.2 * np.abs(new_l - lightness), 0.3, 1)
    angle = np.full_like(new_l, hue)
    if region.hue is not None:
        own = np.rad2deg(np.arctan2(pixels[..., 2], pixels[..., 1]))
        angle += 0.3 * _difference(own, region.hue)
    angle = np.deg2rad(angle)
    new = np.stack([new_l, new_c * np.cos(angle), new_c * np.sin(angle)], axis=-1)
    mixed = pixels + region.weight[..., None] * (new - pixels)
    rgb = np.clip(from_oklab(mixed) * 255 + 0.5, 0, 255).astype(np.uint8)
    return Image.fromarray(np.dstack([rgb, np.asarray(sprite)[..., 3]]), "RGBA")


def ground(colour: str | None) -> tuple[int, int, int]:
    """A ground's pixels; None is white."""
    if colour is None:
        return 255, 255, 255
    lightness, chroma, hue = ANCHORS[colour]
    angle = np.deg2rad(hue)
    lab = np.array([lightness, 0.8 * chroma * np.cos(angle), 0.8 * chroma * np.sin(angle)])
    red, green, blue = np.clip(from_oklab(lab) * 255 + 0.5, 0, 255).astype(int).tolist()
    return red, green, blue


def compose(
    scene: Scene, files: dict[str, Path], size: int, *, alpha: bool = False
) -> tuple[Image.Image, list[tuple[Part, Box]]]:
    """A scene as pixels, and where each of its things stands in it.

    Args:
        scene: what to show.
        files: the drawings, squares with their margins, by object.
        size: side of the picture.
        alpha: whether it is RGBA where it has no ground, instead of on white.
    """
    clear = alpha and scene.ground is None
    picture = Image.new("RGBA", (size, size), (*ground(scene.ground), 0 if clear else 255))
    things: list[tuple[Part, Box]] = []
    for part in reversed(scene.parts):  # what is named first lies on top
        with Image.open(files[part.object]) as file:
            drawing = file.convert("RGBA")
        for place in part.places:
            small, corner, box = _placed(drawing, place, size)
            picture.alpha_composite(small if part.colour is None else turned(small, part.colour), corner)
            things.append((part, box))
    order = {id(part): number for number, part in enumerate(scene.parts)}
    return picture if clear else picture.convert("RGB"), sorted(things, key=lambda thing: order[id(thing[0])])


def _placed(drawing: Image.Image, place: Place, size: int) -> tuple[Image.Image, tuple[int, int], Box]:
    """A drawing as large as its place, that place's corner, and the box of what is drawn."""
    side = max(1, round(place.side * size))
    small = drawing.resize((side, side), Image.Resampling.LANCZOS, reducing_gap=3.0)
    shows = small.getchannel("A").point(lambda alpha: 255 if alpha > 8 else 0)
    left, top, right, bottom = shows.getbbox() or (0, 0, side, side)
    x, y = round(place.left * size), round(place.top * size)
    if place.upright is not None:
        y = max(0, y - top + round(place.upright * (side - (bottom - top))))
    return small, (x, y), (x + left, y + top, right - left, bottom - top)


def _region(pixels: Pixels, alpha: Pixels) -> Region:
    """The main hue of a drawing, or its light or grey parts, or, where it is all dark, the whole."""
    lightness, chroma = pixels[..., 0], np.hypot(pixels[..., 1], pixels[..., 2])
    hue = np.rad2deg(np.arctan2(pixels[..., 2], pixels[..., 1]))
    coloured = np.clip((chroma - 0.012) / 0.025, 0, 1)
    counts, edges = np.histogram(hue, bins=36, range=(-180, 180), weights=alpha * coloured)
    smooth = sum(np.roll(counts, shift) for shift in (-2, -1, 0, 1, 2))
    main = float(edges[int(np.argmax(smooth))]) + 5
    near = np.clip((70 - np.abs(_difference(hue, main))) / 15, 0, 1)
    bright = np.clip((lightness - _OUTLINE + 0.08) / 0.1, 0, 1)
    regions = [(coloured * near, main), ((1 - coloured) * bright, None), (np.ones_like(alpha), None)]
    areas = [float((weight * alpha).sum()) for weight, _ in regions[:2]]
    chosen = 2 if max(areas) < 0.25 * float(alpha.sum()) else int(np.argmax([1.3 * areas[0], areas[1]]))
    weight, own = regions[chosen]
    mean = float((weight * alpha * lightness).sum() / max(1e-6, float((weight * alpha).sum())))
    return Region(weight.astype(np.float32), mean, own)


def _difference(angle: Pixels, other: float) -> Pixels:
    """From -180 to 180 degrees."""
    return (angle - other + 180) % 360 - 180


def _pixels(image: Image.Image) -> tuple[Pixels, Pixels]:
    """OKLab and opacity of an RGBA picture."""
    rgba = np.asarray(image, dtype=np.float32) / 255
    return to_oklab(rgba[..., :3]).astype(np.float32), rgba[..., 3]
