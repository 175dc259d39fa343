"""A captioned set that is drawn, not downloaded: coloured shapes in COCO's format.

Each picture shows one or two shapes; kind, colour, size and place are in its captions, so that a model that
reads them has something to prove.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from stable_diffusion.data.item import Progress
from stable_diffusion.data.made import Captioned, make_set, write_captions

Outline = tuple[tuple[float, float], ...]

_DESCRIPTION = "mini-stable-diffusion shapes, version 1"
_SUPERSAMPLING = 4
_SINGLE = 0.7  # part of the pictures that show one shape
_WHITE = 0.6  # part of the pictures on white
_JITTER = 10  # largest difference of a channel from its colour in the table


def _polar(corners: int, radius: Callable[[int], float]) -> Outline:
    """Corners around the centre, the first at the top, clockwise; ``radius`` gives each one's distance."""
    angles = [2 * math.pi * i / corners for i in range(corners)]
    return tuple((radius(i) * math.sin(a), -radius(i) * math.cos(a)) for i, a in enumerate(angles))


def _heart(corners: int = 96) -> Outline:
    turns = [2 * math.pi * i / corners for i in range(corners)]
    return tuple(
        (
            math.sin(t) ** 3,
            -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t) + 2.5) / 16,
        )
        for t in turns
    )


_S, _C = 0.88, 0.32  # half the square's side, so that it looks as large as the circle; half the cross's arm

SHAPES: dict[str, tuple[Outline, ...]] = {
    "circle": (_polar(96, lambda _: 1.0),),
    "square": (((-_S, -_S), (_S, -_S), (_S, _S), (-_S, _S)),),
    "triangle": (((0, -0.95), (1, 0.8), (-1, 0.8)),),
    "star": (_polar(10, lambda i: 0.42 if i % 2 else 1.0),),
    "heart": (_heart(),),
    "diamond": (((0, -1), (0.72, 0), (0, 1), (-0.72, 0)),),
    "cross": (
        (
            *((-_C, -1), (_C, -1), (_C, -_C), (1, -_C), (1, _C), (_C, _C)),
            *((_C, 1), (-_C, 1), (-_C, _C), (-1, _C), (-1, -_C), (-_C, -_C)),
        ),
    ),
    "ring": (_polar(96, lambda _: 1.0), _polar(96, lambda _: 0.55)),
}
"""Each shape's outline in the square from -1 to 1, y down, then the holes in it."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 35),
    "orange": (250, 140, 20),
    "yellow": (250, 220, 40),
    "green": (35, 155, 60),
    "blue": (35, 80, 220),
    "purple": (130, 45, 170),
    "pink": (250, 145, 190),
    "brown": (115, 65, 30),
    "black": (25, 25, 25),
    "grey": (135, 135, 135),
}
"""RGB, 0 to 255; a picture's colour is up to 10 away in each channel."""

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "light grey": (236, 236, 236),
    "light blue": (226, 238, 252),
    "light green": (228, 246, 230),
    "light yellow": (253, 249, 226),
}

SIZES = {"small": 0.20, "medium": 0.31, "large": 0.44}
"""Side of the square around a shape, as a part of the picture's side."""

PLACES: dict[str, tuple[float, float]] = {
    "top left": (0.26, 0.26),
    "top": (0.5, 0.26),
    "top right": (0.74, 0.26),
    "left": (0.26, 0.5),
    "centre": (0.5, 0.5),
    "right": (0.74, 0.5),
    "bottom left": (0.26, 0.74),
    "bottom": (0.5, 0.74),
    "bottom right": (0.74, 0.74),
}
"""A shape's centre (x, y) as parts of the picture's sides; two in a row do not touch, whatever their size."""


@dataclass(frozen=True)
class _Figure:
    shape: str
    colour: str
    size: str
    place: str


def write_shapes(out: Path, count: int, size: int, seed: int) -> Generator[Progress, None, None]:
    """Makes ``train/``, ``val/`` (a tenth) and ``annotations/captions_{split}.json``, as it is consumed.

    A pure function of its arguments, byte for byte. In the JSON files each image also lists what it ``shows``,
    in words.

    Args:
        out: a folder that is empty, new, or such a set, which is left as it is if it was made with the same.
        count: pictures in all.
        size: side of the pictures in pixels.
        seed: of all random numbers.

    Raises:
        InputError: ``out`` holds something else or cannot be written.
    """
    info = {"description": _DESCRIPTION, "count": count, "size": size, "seed": seed}
    train = count - max(1, count // 10)

    def fill(root: Path) -> Iterator[Progress]:
        for split, numbers in {"train": range(train), "val": range(train, count)}.items():
            for number in _write_split(root, split, numbers, size, seed, info):
                yield Progress("drawing", number, count)
        yield Progress("drawing", count, count)

    yield from make_set(out, "shapes", info, ("annotations/captions_train.json",), fill)


def _write_split(
    root: Path, split: str, numbers: range, size: int, seed: int, info: dict[str, Any]
) -> Iterator[int]:
    """Yields each number before its picture is drawn."""
    (root / split).mkdir()
    pictures: Captioned = []
    for number in numbers:
        yield number
        rng = random.Random(f"{seed}/{number}")
        figures = _figures(rng)
        background = "white" if rng.random() < _WHITE else rng.choice(list(BACKGROUNDS)[1:])
        name = f"{number:06d}.png"
        _draw(rng, figures, background, size).save(root / split / name)
        shows = [asdict(figure) for figure in figures]
        image = {"id": number, "file_name": name, "width": size, "height": size, "shows": shows}
        pictures.append((image, _captions(rng, figures, background)))
    write_captions(root, split, info, pictures)


def _figures(rng: random.Random) -> tuple[_Figure, ...]:
    """One figure anywhere, or two of different colours beside or above each other."""
    if rng.random() < _SINGLE:
        places = [rng.choice(list(PLACES))]
    else:
        places = rng.choice([["left", "right"], ["top", "bottom"]])
    colours = rng.sample(list(COLOURS), len(places))
    return tuple(
        _Figure(rng.choice(list(SHAPES)), colour, rng.choice(list(SIZES)), place)
        for colour, place in zip(colours, places, strict=True)
    )


def _draw(rng: random.Random, figures: tuple[_Figure, ...], background: str, size: int) -> Image.Image:
    image = Image.new("RGB", (size, size), BACKGROUNDS[background])
    for figure in figures:
        side = SIZES[figure.size] * rng.uniform(0.96, 1.04)
        x, y = (centre + rng.uniform(-0.01, 0.01) for centre in PLACES[figure.place])
        jittered = (value + rng.randint(-_JITTER, _JITTER) for value in COLOURS[figure.colour])
        colour = tuple(min(255, max(0, value)) for value in jittered)
        left, top = (math.floor((centre - side / 2) * size) for centre in (x, y))
        edge = math.ceil(side * size) + 2  # the mask's side in pixels
        mask = Image.new("L", (edge * _SUPERSAMPLING, edge * _SUPERSAMPLING))
        pen = ImageDraw.Draw(mask)
        for number, outline in enumerate(SHAPES[figure.shape]):
            corners = (
                ((x + px * side / 2) * size - left, (y + py * side / 2) * size - top) for px, py in outline
            )
            fine = [(px * _SUPERSAMPLING, py * _SUPERSAMPLING) for px, py in corners]
            pen.polygon(fine, fill=0 if number else 255)
        image.paste(colour, (left, top), mask.reduce(_SUPERSAMPLING))
    return image


def _captions(rng: random.Random, figures: tuple[_Figure, ...], background: str) -> list[str]:
    """Three or four different captions, from the barest to the fullest."""
    forms = list(_single(figures[0]) if len(figures) == 1 else _double(figures[0], figures[1]))
    if background != "white":
        forms.append(f"{forms[0]} on a {background} background")
    captions = [forms[0], *rng.sample(forms[1:], min(len(forms) - 1, rng.choice([2, 3])))]
    if rng.random() < 0.3:  # prompts come in both spellings
        captions = [text.replace("grey", "gray").replace("centre", "center") for text in captions]
    return captions


def _single(figure: _Figure) -> Iterator[str]:
    thing, place = f"{figure.colour} {figure.shape}", f"{_preposition(figure.place)} the {figure.place}"
    for phrase in (f"{_article(thing)} {thing}", f"a {figure.size} {thing}"):
        yield phrase
        yield f"{phrase} {place}"
    yield f"{thing}, {figure.size}, {figure.place}"


def _double(first: _Figure, second: _Figure) -> Iterator[str]:
    """``first`` is on the left or at the top."""
    plain = [f"{figure.colour} {figure.shape}" for figure in (first, second)]
    a, b = (f"{_article(thing)} {thing}" for thing in plain)
    sized_a, sized_b = f"a {first.size} {plain[0]}", f"a {second.size} {plain[1]}"
    beside = first.place == "left"
    forward, backward = ("to the left of", "to the right of") if beside else ("above", "below")
    at_first, at_second = (f"{_preposition(figure.place)} the {figure.place}" for figure in (first, second))
    yield f"{a} {at_first} and {b} {at_second}"
    yield f"{a} and {b}"
    yield f"{a} {forward} {b}"
    yield f"{b} {backward} {a}"
    yield f"{sized_a} {at_first} and {sized_b} {at_second}"
    yield f"{sized_a} {forward} {sized_b}"


def _preposition(place: str) -> str:
    if place in ("left", "right"):
        return "on"
    return "at" if place in ("top", "bottom") else "in"


def _article(thing: str) -> str:
    return "an" if thing[0] in "aeiou" else "a"
