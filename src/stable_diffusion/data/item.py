"""What a set of captioned images is to everything that reads one."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Protocol

from PIL import Image


class Item(NamedTuple):
    """One picture and what it is called."""

    image: Image.Image
    """RGB, upright, of any size."""
    captions: tuple[str, ...]
    """At least one; each without surrounding space, none empty."""


class Progress(NamedTuple):
    """How far work on a set has come."""

    what: str
    """What is being done, such as "drawing"."""
    done: int
    total: int


class CaptionedImages(Protocol):
    """A set of captioned images in a fixed order. Members can be pickled, for spawned workers."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Item:
        """Raises InputError if the picture cannot be decoded, IndexError past the end."""
        ...

    def captions(self, index: int) -> tuple[str, ...]:
        """The picture's captions, without decoding it."""
        ...

    def weight(self, index: int) -> float:
        """How often training draws the picture, relative to the others: above 0, and 1 where nothing is said."""
        ...

    def name(self, index: int) -> str:
        """The picture's file name, unique in the set: for messages and for the keys of caches."""
        ...

    def path(self, index: int) -> Path:
        """The picture's file."""
        ...
