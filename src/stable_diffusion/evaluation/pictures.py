"""Which real pictures an evaluation looks at, and which of their captions it asks a model for.

Everything is decided by hashes of the seed and the pictures' names, so that every model gets the same captions,
and a smaller count a part of a larger one's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from stable_diffusion.data.cache import Array
from stable_diffusion.data.item import Entry, Split, squares
from stable_diffusion.errors import InputError

MOST = 20_000
"""Pictures of a split that features are computed of, at most: COCO has 118,000 to train on."""
RULE = (
    "Pictures are taken in the order of the SHA-256 of seed and file name; of a picture's captions that name its"
    " style (all, where none does), the hash of seed, file name and the word caption chooses one; the k-th"
    " picture of a group is generated with the seed plus k."
)


@dataclass(frozen=True)
class Group:
    """A part of a split that is scored as one."""

    name: str
    split: Split
    rows: list[int]
    """Of the split's entries, in the order in which they are taken."""

    def caption(self, row: int, seed: int) -> str:
        """The caption that the model is asked for: one with the entry's ``style_words``, where it has any."""
        entry = self.split.entries[row]
        words = entry.fields.get("style_words")
        words = [word for word in words if isinstance(word, str)] if isinstance(words, list) else []
        captions = [text for text in entry.captions if any(word in text for word in words)] or entry.captions
        return captions[_hash(seed, entry.key, "caption") % len(captions)]


def in_order(splits: Iterable[Split]) -> list[Split]:
    """The splits with at most ``MOST`` entries, those whose names begin with test last."""
    found = sorted(splits, key=lambda split: split.name.startswith("test"))  # keeps the order else
    return [replace(split, entries=_fixed_part(split.entries)) for split in found]


def _fixed_part(entries: Sequence[Entry]) -> list[Entry]:
    kept = {entry.key for entry in sorted(entries, key=lambda entry: _hash(0, entry.key))[:MOST]}
    return [entry for entry in entries if entry.key in kept]


def groups(split: Split, seed: int) -> list[Group]:
    """The parts of a split that are scored, each with its pictures in the order that the seed gives.

    A split is one part, unless the field ``part`` of all its entries says to which they belong.
    """
    order, parts = in_hash_order(split, seed), split.field("part")
    if parts is None:
        return [Group(split.name, split, order)]
    return [
        Group(f"{split.name}, {part}", split, [row for row in order if parts[row] == part])
        for part in sorted(set(parts))
    ]


def in_hash_order(split: Split, seed: int) -> list[int]:
    """The numbers of the split's entries in the order that the seed gives."""
    return sorted(range(len(split.entries)), key=lambda row: _hash(seed, split.entries[row].key))


def pictures(split: Split, size: int, rows: Sequence[int] | None = None) -> Iterator[Array]:
    """Pictures of the split, uint8 ``h w 3``, cut and scaled to a square of `size` pixels a side.

    Raises:
        InputError: one of them cannot be decoded.
    """
    entries = split.entries if rows is None else [split.entries[row] for row in rows]
    for picture in squares(split.source, [entry.key for entry in entries], size):
        if isinstance(picture, InputError):
            raise picture
        yield np.asarray(picture)


def _hash(seed: int, *parts: str) -> int:
    return int.from_bytes(
        hashlib.sha256("\n".join([str(seed), *parts]).encode(errors="backslashreplace")).digest(), "big"
    )
