"""Scenes that the detector learns from: cut-out drawings, pasted at random with known boxes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image

from stable_diffusion.data.cache import Array
from stable_diffusion.evaluation.ground import ground

TOGETHER = 512
SMALLEST = 24
"""Side in pixels of the smallest thing that is pasted."""

_GRIDS = ((1, 1), (1, 2), (2, 1), (2, 2), (1, 3), (3, 1), (2, 3), (3, 2), (3, 3))  # rows, columns
_GRID_ODDS = (0.1, 0.12, 0.06, 0.26, 0.07, 0.03, 0.1, 0.06, 0.2)
_LUMINANCE = np.array([0.299, 0.587, 0.114], dtype=np.float32)
_CHROMA = np.linalg.svd(np.ones((1, 3)))[2][1:].T.astype(np.float32)  # two axes across grey


@dataclass(frozen=True, kw_only=True)
class Sprite:
    """A drawing without its ground."""

    pixels: Array
    """Uint8 ``h w 4``, the last channel 255 where the drawing is."""
    label: int


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A picture and what it shows."""

    pixels: Array
    """Uint8 ``h w 3``."""
    boxes: Array
    """Left, top, right, bottom of each thing in pixels, ``n 4``."""
    labels: Array
    """The things' classes."""


def cut_out(pictures: Iterable[Array], labels: Sequence[int]) -> list[Sprite]:
    """The drawings, uint8 ``h w 3`` on white, each cut to its own box."""
    sprites: list[Sprite] = []
    batch: list[Array] = []
    for number, picture in enumerate(pictures, 1):
        batch.append(picture)
        if len(batch) == TOGETHER or number == len(labels):
            together = np.stack(batch)
            white = np.full((len(batch), 3), 255, dtype=np.uint8)
            alphas = np.where(ground(together, white), 0, 255).astype(np.uint8)
            own = labels[number - len(batch) : number]
            for pixels, alpha, label in zip(together, alphas, own, strict=True):
                rows, columns = (np.flatnonzero(alpha.any(axis)) for axis in (1, 0))
                if len(rows):
                    inside = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
                    rgba = np.dstack([pixels, alpha])[inside]
                    sprites.append(Sprite(pixels=np.ascontiguousarray(rgba), label=label))
            batch = []
    return sprites


class Composer:
    """Pastes sprites: one to nine in the cells of a grid, any object as often as any other."""

    def __init__(self, sprites: Sequence[Sprite], size: int) -> None:
        self.size = size
        by_label: dict[int, list[Sprite]] = {}
        for sprite in sprites:
            by_label.setdefault(sprite.label, []).append(sprite)
        self._drawings = [by_label[label] for label in sorted(by_label)]

    def scene(self, random: np.random.Generator) -> Scene:
        """A scene whose every choice is sampled."""
        rows, columns = _GRIDS[random.choice(len(_GRIDS), p=_GRID_ODDS)]
        cells = random.permutation(rows * columns)
        cells = cells[: random.integers((2 * len(cells) + 2) // 3, len(cells) + 1)]
        canvas, multiplied = self._ground(random)
        alike = random.random() < 0.15  # one object, several times
        sprites = [self._sprite(random)] * len(cells) if alike else [self._sprite(random) for _ in cells]
        colours = [_recolouring(random)] * len(cells) if alike else [_recolouring(random) for _ in cells]
        boxes, labels = [], []
        height, width = self.size / rows, self.size / columns
        longest = min(height, width) * (random.uniform(0.6, 1.1) if alike or random.random() < 0.5 else 0)
        for cell, sprite, colour in zip(cells.tolist(), sprites, colours, strict=True):
            side = longest or min(height, width) * random.uniform(0.5, 1.1)
            thing = _resized(sprite.pixels, float(np.clip(side, SMALLEST, self.size)), random)
            h, w = thing.shape[:2]
            row, column = divmod(cell, columns)
            y = (row + 0.5) * height + random.uniform(-0.5, 0.5) * max(height - h, 4)
            x = (column + 0.5) * width + random.uniform(-0.5, 0.5) * max(width - w, 4)
            top = int(np.clip(y - h / 2, 0, self.size - h))
            left = int(np.clip(x - w / 2, 0, self.size - w))
            _paste(canvas[top : top + h, left : left + w], thing, colour, multiplied)
            boxes.append((left, top, left + w, top + h))
            labels.append(sprite.label)
        pixels = canvas.clip(0, 255).astype(np.uint8)
        return Scene(pixels=pixels, boxes=np.array(boxes, dtype=np.float32), labels=np.array(labels))

    def _sprite(self, random: np.random.Generator) -> Sprite:
        same = self._drawings[random.integers(len(self._drawings))]
        return same[random.integers(len(same))]

    def _ground(self, random: np.random.Generator) -> tuple[Array, bool]:
        """White, one colour, or one that fades into another; and whether things are multiplied with it."""
        canvas = np.full((self.size, self.size, 3), 255, dtype=np.float32)
        if (kind := random.random()) < 0.7:
            return canvas, False
        first, second = random.uniform(0 if kind > 0.93 else 150, 255, (2, 3)).astype(np.float32)
        fade = np.linspace(0, random.random() < 0.3, self.size, dtype=np.float32)[:, None, None]
        canvas[:] = first + (second - first) * fade
        return canvas, bool(random.random() < 0.4 and kind < 0.93)


def _resized(pixels: Array, side: float, random: np.random.Generator) -> Array:
    """With the longer side about as long as asked, and a little narrower or wider."""
    h, w = pixels.shape[:2]
    stretch = random.uniform(0.92, 1.08)
    scale = side / max(h, w)
    size = max(round(w * scale * stretch), 4), max(round(h * scale / stretch), 4)
    size = min(size[0], round(side)), min(size[1], round(side))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR), dtype=np.float32)


class Recolouring(NamedTuple):
    """A linear change of pixels, and of which of them."""

    matrix: Array
    offset: float
    part: str
    """``all``, ``coloured`` without black, grey and white, or ``light`` without outlines and eyes."""


def _recolouring(random: np.random.Generator) -> Recolouring:
    """None to speak of, a turn in hue, or shades of one colour."""
    kind, offset = random.random(), random.uniform(-15, 15)
    matrix: Array = np.eye(3, dtype=np.float32)
    if 0.4 < kind < 0.65:
        angle, saturation = random.uniform(0, 2 * np.pi), random.uniform(0.5, 1.4)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]], dtype=np.float32)
        matrix = np.full((3, 3), 1 / 3, dtype=np.float32) + saturation * _CHROMA @ turn @ _CHROMA.T
    elif kind >= 0.65:
        colour, mixed = random.uniform(0, 1, 3).astype(np.float32), random.uniform(0.5, 1)
        shades = np.outer(_LUMINANCE, colour * random.uniform(1, 1.4))
        matrix = (1 - mixed) * matrix + mixed * shades
        offset += random.uniform(0, 60) * (random.random() < 0.3)
    part = "all" if kind <= 0.4 else str(random.choice(["all", "coloured", "light"]))
    return Recolouring((matrix * random.uniform(0.85, 1.1)).astype(np.float32), offset, part)


def _paste(place: Array, thing: Array, colour: Recolouring, multiplied: bool) -> None:
    """Blends the thing into the canvas."""
    alpha, old = thing[..., 3:] / 255, thing[..., :3]
    new = (old @ colour.matrix + colour.offset).clip(0, 255)
    if colour.part != "all":
        lightest = old.max(2, keepdims=True)
        amount = lightest - old.min(2, keepdims=True) if colour.part == "coloured" else lightest - 40
        new = old + (amount / 40).clip(0, 1) * (new - old)
    place[:] = alpha * (new * place / 255 if multiplied else new) + (1 - alpha) * place
