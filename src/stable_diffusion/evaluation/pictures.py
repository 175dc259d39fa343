"""Which real pictures an evaluation looks at, and which of their captions it asks a model for.

Everything is decided by hashes of the seed and the pictures' names, so that every model gets the same captions,
and a smaller count a part of a larger one's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from stable_diffusion import images
from stable_diffusion.data.cache import Array, digest
from stable_diffusion.data.check import TRAINING, find_splits
from stable_diffusion.data.check import Split as Place
from stable_diffusion.data.coco import CocoImageLoader
from stable_diffusion.data.icon_captions import STYLES

T = TypeVar("T")

MOST = 20_000
"""Pictures of a split that features are computed of, at most: COCO has 118,000 to train on."""
SISTERS_APART = "test_style"
"""The split whose drawings with a sister in training, which a model can copy, are reported apart."""
RULE = (
    "Pictures are taken in the order of the SHA-256 of seed and file name; of a picture's captions that name its"
    " style (all, where none does), the hash of seed, file name and the word caption chooses one; the k-th"
    " picture of a group is drawn with the seed plus k."
)


@dataclass(frozen=True)
class Split:
    """The pictures of one split; its lists run over ``numbers``."""

    name: str
    data: CocoImageLoader
    numbers: list[int]
    """Of the pictures in the loader, in its order."""
    objects: list[str] | None
    """What each picture shows; None where the set does not say."""
    styles: list[str] | None
    sisters: list[bool] | None

    @property
    def is_training(self) -> bool:
        """Whether models are trained on it, by its name."""
        return self.name.startswith(TRAINING)

    def names(self) -> list[str]:
        return [self.data.name(number) for number in self.numbers]

    def key(self, size: int) -> str:
        """A digest of the files, at a size."""
        stats = [self.data.path(number).stat() for number in self.numbers]
        return digest(self.names(), [(stat.st_size, stat.st_mtime_ns) for stat in stats], size)

    def pictures(self, size: int, rows: Sequence[int] | None = None) -> Iterator[Array]:
        """Pictures of the split, uint8 ``h w 3``, cut and scaled to a square of `size` pixels a side."""
        for row in range(len(self.numbers)) if rows is None else rows:
            yield np.asarray(images.cover(self.data[self.numbers[row]].image, size, size))


@dataclass(frozen=True)
class Group:
    """A part of a split that is scored as one."""

    name: str
    split: Split
    rows: list[int]
    """Of the split's lists, in the order in which they are taken."""

    def caption(self, row: int, seed: int) -> str:
        """The caption that the model is asked for."""
        number = self.split.numbers[row]
        captions = self.split.data.captions(number)
        style = None if self.split.styles is None else STYLES.get(self.split.styles[row])
        if style is not None:
            words = (f"{style.name} style", style.look)
            captions = tuple(text for text in captions if any(word in text for word in words)) or captions
        return captions[_hash(seed, self.split.data.name(number), "caption") % len(captions)]


def open_splits(folder: Path) -> list[Split]:
    """The splits of a set: the training split first, then others, then those whose names begin with test.

    Fields beside COCO's, which the set of icons has, count where every picture of a split has them.

    Raises:
        InputError: there is no split, or one cannot be read.
    """
    found = sorted(
        find_splits(folder), key=lambda split: split.name.startswith("test")
    )  # keeps the order else
    return [_open(split) for split in found]


def _open(place: Place) -> Split:
    data = CocoImageLoader(place.images, place.captions)
    numbers = sorted(sorted(range(len(data)), key=lambda number: _hash(0, data.name(number)))[:MOST])
    entries = {image["file_name"]: image for image in json.loads(place.captions.read_bytes())["images"]}
    chosen = [entries[data.name(number)] for number in numbers]

    def field(key: str, kind: type[T]) -> list[T] | None:
        values = [value for entry in chosen if isinstance(value := entry.get(key), kind)]
        return values if len(values) == len(chosen) else None

    objects, styles, sisters = field("object", str), field("style", str), field("sister", bool)
    return Split(place.name, data, numbers, objects, styles, sisters)


def groups(split: Split, seed: int) -> list[Group]:
    """The parts of a split that are scored, each with its pictures in the order that the seed gives."""
    names = split.names()
    order = sorted(range(len(names)), key=lambda row: _hash(seed, names[row]))
    if split.name != SISTERS_APART or split.sisters is None:
        return [Group(split.name, split, order)]
    sisters = split.sisters
    parts = {
        f"{split.name}, no sister": [row for row in order if not sisters[row]],
        f"{split.name}, sister": [row for row in order if sisters[row]],
    }
    return [Group(name, split, rows) for name, rows in parts.items() if rows]


def _hash(seed: int, *parts: str) -> int:
    return int.from_bytes(hashlib.sha256("\n".join([str(seed), *parts]).encode()).digest(), "big")
