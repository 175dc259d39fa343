"""Scenes of the icons: which things, how many, in which colour and where; and what of that training may not show.

What is held out, pairs, colours, counts and positions, is decided by a stable hash before any model exists.
"""

from __future__ import annotations

import random
from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple, TypeVar

from stable_diffusion.data.icon_captions import STYLES, Thing, chance
from stable_diffusion.data.icon_phrases import is_plain, phrase_of, synonyms

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "grey")
"""The basic colour terms of English (Berlin & Kay 1969), GenEval's too."""

SCENE_SPLITS: dict[str, str] = {
    "test_pair": "two things: 10 % of the pairs of objects",
    "test_colour": "one thing in a colour: 10 % of the pairs of object and colour",
    "test_count": "two to four of a kind: 10 % of the pairs of object and number",
    "test_position": "two things, one left of, right of, above or below the other: in each of these relations 10 % of"
    " the pairs of objects, of those that test_pair holds",
    "test_binding": "two things in two colours: the pairs of objects that test_pair holds",
}
"""The splits of scenes and their rules. No scene for training shows what a rule holds out, not even beside others."""

POSITIONS = ("left of", "right of", "above", "below")
_RATE = 0.1

T = TypeVar("T")


class Drawn(NamedTuple):
    """A drawing that scenes are made of."""

    style: str
    thing: Thing
    can_turn: bool
    """Whether a colour that it is turned to shows."""


class Place(NamedTuple):
    """A square for a drawing with its margins, in sides of the picture."""

    left: float
    top: float
    side: float
    upright: float | None = None
    """Where what is drawn stands in the square: 0 at its top, 1 at its bottom; None as it is drawn."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One thing, or several of a kind."""

    object: str
    places: tuple[Place, ...]
    colour: str | None = None
    """One of ``COLOURS``; None as it is drawn."""
    size: str | None = None
    """What captions say of it, "small" or "big"."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What a picture shows; of its parts the later ones lie on the earlier ones."""

    task: str
    style: str
    parts: tuple[Part, ...]
    relation: str
    """Of the first part to the others: a key of ``_SAID``."""
    ground: str | None = None
    """A colour; None is white, and captions do not say it."""
    captions: tuple[str, ...] = ()


class Cast:
    """Drawings by style and object, and how often each object plays."""

    def __init__(self, drawings: Sequence[Drawn]) -> None:
        self.drawn: dict[str, dict[str, Drawn]] = {style: {} for style in STYLES}
        for one in drawings:
            if one.thing.tone is None:
                self.drawn[one.style].setdefault(one.thing.object, one)
        self.things = {name: one.thing for style in self.drawn.values() for name, one in style.items()}
        self.names = sorted(self.things)
        self.ends = list(accumulate(_part_of(self.things[name]) for name in self.names))

    def named(self, lots: random.Random) -> str:
        """An object by its share."""
        return self.names[bisect(self.ends, lots.random() * self.ends[-1], hi=len(self.names) - 1)]

    def plain(self, name: str) -> list[str]:
        """Phrases for the object that adjectives and a plural suit, its own name first."""
        return [p for p in (phrase_of(self.things[name]), *synonyms(name)) if is_plain(p)]


def is_held(kind: str, *names: str) -> bool:
    """Whether training may not see it.

    Args:
        kind: a split: ``test_pair`` of two objects, ``test_colour`` of object and colour, ``test_count`` of object
            and number, ``test_position`` of a relation and two objects in their order.
        names: what they are.
    """
    if kind == "test_pair":
        names = tuple(sorted(names))
    elif kind == "test_position" and names[0] in ("right of", "below"):  # the same as: b left of a
        names = (POSITIONS[POSITIONS.index(names[0]) - 1], names[2], names[1])
    return chance(kind, *names) < _RATE


def _part_of(thing: Thing) -> float:
    """How often a thing plays, relative to others: people, flags, letters, signs and the many clocks rarely."""
    if thing.group == "people-body" or not thing.nameable:
        return 0.03
    if thing.object.startswith(("clock at", "open mailbox", "closed mailbox", "globe showing")):
        return 0.1
    return {"symbols": 0.08, "smileys-emotion": 0.35}.get(thing.group, 1.0)


def one_of(lots: random.Random, choices: Sequence[T]) -> T:
    """One of the choices; each is as likely."""
    return choices[int(lots.random() * len(choices))]
