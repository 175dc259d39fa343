"""Scenes planned from names and random numbers alone: what is sampled, and where it stands.

Things stand on a grid of eighths of the picture, and nearly all are drawn in full or at half size. A model of 16x16
latents, which its network halves once, then sees one and the same small drawing wherever it stands: at any place and
size it would have to learn each drawing anew for each (docs/training-log.md).
"""

from __future__ import annotations

import random
from bisect import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, combinations

from stable_diffusion.data.icon_captions import STYLES
from stable_diffusion.data.icon_scenes import COLOURS, POSITIONS, Cast, Part, Place, Scene, is_held, one_of
from stable_diffusion.data.icon_sentences import captions


def scenes(cast: Cast, split: str, count: int) -> Iterator[Scene]:
    """So many scenes of ``train``, or of one of ``SCENE_SPLITS``: each a function of the cast and its number."""
    kinds = _KINDS if split == "train" else {_TASKS[split]: 1.0}
    for number in range(count):
        lots = random.Random(f"{split} {number}")
        make = _weighted(lots, kinds)
        scene = None
        while scene is None or not _belongs(scene, split):
            scene = make(cast, lots)
            if scene is not None and split == "train":
                scene = _grounded(scene, lots)
        yield replace(scene, captions=tuple(captions(cast, scene, lots, exact=split != "train")))


def _belongs(scene: Scene, split: str) -> bool:
    """Whether what is held out in it is nothing, or just what the split is for."""
    objects, parts = [part.object for part in scene.parts], scene.parts
    held = {
        "test_pair": any(is_held("test_pair", a, b) for a, b in combinations(objects, 2)),
        "test_colour": any(is_held("test_colour", p.object, p.colour) for p in parts if p.colour),
        "test_count": any(
            is_held("test_count", p.object, str(len(p.places))) for p in parts if len(p.places) > 1
        ),
        "test_position": scene.relation in POSITIONS and is_held("test_position", scene.relation, *objects),
    }
    wanted = {
        "train": (),
        "test_position": ("test_pair", "test_position"),
        "test_binding": ("test_pair",),
    }
    return {name for name, is_so in held.items() if is_so} == {*wanted.get(split, (split,))}


Kind = Callable[[Cast, random.Random], Scene | None]
"""Samples a scene of one kind; None where what it sampled does not suit."""


def _small(cast: Cast, lots: random.Random) -> Scene | None:
    part = Part(object=cast.named(lots), places=(_MIDDLE,), size="small")
    return _scene(cast, lots, "single", [part])


def _single(cast: Cast, lots: random.Random) -> Scene | None:
    scene = _scene(cast, lots, "single", [Part(object=cast.named(lots), places=(_WHOLE,))])
    return scene and replace(scene, ground=one_of(lots, COLOURS))


def _coloured(cast: Cast, lots: random.Random) -> Scene | None:
    part = Part(object=cast.named(lots), places=(_WHOLE,), colour=one_of(lots, COLOURS))
    return _scene(cast, lots, "colour", [part])


def _counted(cast: Cast, lots: random.Random) -> Scene | None:
    places = _laid(lots, 2 + int(lots.random() * 3))
    colour = one_of(lots, COLOURS) if lots.random() < 0.25 else None
    return _scene(cast, lots, "counting", [Part(object=cast.named(lots), places=places, colour=colour)])


def _counted_plainly(cast: Cast, lots: random.Random) -> Scene | None:
    part = Part(object=cast.named(lots), places=_laid(lots, 2 + int(lots.random() * 3)))
    return _scene(cast, lots, "counting", [part])


def _two(cast: Cast, lots: random.Random) -> Scene | None:
    a, b = ((place,) for place in _BESIDE)
    return _scene(cast, lots, "two", [_part(cast, lots, a), _part(cast, lots, b)])


def _sized(cast: Cast, lots: random.Random) -> Scene | None:
    """A big thing and a small one, in either order."""
    sizes = [("big", 0.5, 0.25), ("small", 0.25, 0.375)]
    if lots.random() < 0.5:
        sizes.reverse()
    parts = [
        _part(cast, lots, (Place(left + (0.5 - side) / 2, top, side),), size=size)
        for left, (size, side, top) in zip((0.0, 0.5), sizes, strict=True)
    ]
    return _scene(cast, lots, "two", parts)


def _positioned(cast: Cast, lots: random.Random) -> Scene | None:
    relation = one_of(lots, POSITIONS)
    places = _BESIDE if relation in POSITIONS[:2] else _STACKED
    a, b = places if relation in ("left of", "above") else places[::-1]
    return _scene(cast, lots, "position", [_part(cast, lots, (a,)), _part(cast, lots, (b,))], relation)


def _on_top(cast: Cast, lots: random.Random) -> Scene | None:
    upper, lower = (place._replace(upright=at) for place, at in zip(_STACKED, (1.0, 0.0), strict=True))
    parts = [_part(cast, lots, (upper,)), _part(cast, lots, (lower,))]
    return _scene(cast, lots, "position", parts, "on top of")


def _wearing(cast: Cast, lots: random.Random) -> Scene | None:
    hat = Part(object=one_of(lots, _HATS), places=(Place(0.3125, 0.03, 0.375, 1.0),))
    heads = [name for name in cast.names if name in _HEADS]
    head = Part(object=one_of(lots, heads or cast.names), places=(Place(0.25, 0.375, 0.5, 0.0),))
    return _scene(cast, lots, "position", [hat, head], "wearing")


def _bound(cast: Cast, lots: random.Random) -> Scene | None:
    """Two things in two colours."""
    first, second = one_of(lots, COLOURS), one_of(lots, COLOURS)
    if first == second:
        return None
    parts = [_part(cast, lots, (place,), colour=c) for place, c in zip(_BESIDE, (first, second), strict=True)]
    return _scene(cast, lots, "binding", parts)


def _bound_anywhere(cast: Cast, lots: random.Random) -> Scene | None:
    """Two things in two colours, or one of them as it is, in any relation."""
    scene = (_bound if lots.random() < 0.5 else _positioned)(cast, lots)
    if scene is None:
        return None
    parts = [replace(part, colour=one_of(lots, COLOURS)) for part in scene.parts]
    if lots.random() < 0.3:
        i = int(lots.random() * 2)
        parts[i] = replace(parts[i], colour=None)
    if parts[0].colour == parts[1].colour:
        return None
    return _scene(cast, lots, "binding", parts, scene.relation)


def _grouped(cast: Cast, lots: random.Random) -> Scene | None:
    """Several of one kind and one or several of another: "two red apples and a blue fox"."""
    first, second = one_of(lots, ((2, 1), (1, 2), (2, 2), (3, 1), (1, 3)))
    places = _laid(lots, first + second)
    colours = [one_of(lots, COLOURS) if lots.random() < 0.6 else None for _ in range(2)]
    parts = [
        _part(cast, lots, places[:first], colour=colours[0]),
        _part(cast, lots, places[first:], colour=colours[1]),
    ]
    return _scene(cast, lots, "many", parts)


def _many(cast: Cast, lots: random.Random) -> Scene | None:
    """Three or four different things; of three the first may stand between the others."""
    count = 3 + (lots.random() < 0.6)
    if count == 3 and lots.random() < 0.4:
        return _scene(cast, lots, "many", [_part(cast, lots, (place,)) for place in _TRIANGLES[0]], "between")
    return _scene(cast, lots, "many", [_part(cast, lots, (place,)) for place in _laid(lots, count)])


_KINDS: Mapping[Kind, float] = {
    _small: 0.06,
    _single: 0.06,
    _coloured: 0.13,
    _counted: 0.14,
    _two: 0.13,
    _sized: 0.02,
    _positioned: 0.13,
    _on_top: 0.04,
    _wearing: 0.01,
    _bound_anywhere: 0.1,
    _grouped: 0.05,
    _many: 0.23,
}
"""Shares of the scenes for training. Many different things teach most: what each looks like when it is small."""

_TASKS: Mapping[str, Kind] = {
    "test_pair": _two,
    "test_colour": _coloured,
    "test_count": _counted_plainly,
    "test_position": _positioned,
    "test_binding": _bound,
}


def _part(
    cast: Cast,
    lots: random.Random,
    places: Sequence[Place],
    *,
    colour: str | None = None,
    size: str | None = None,
) -> Part:
    return Part(object=cast.named(lots), places=tuple(places), colour=colour, size=size)


def _scene(
    cast: Cast, lots: random.Random, task: str, parts: Sequence[Part], relation: str = "next to"
) -> Scene | None:
    """The scene in a style that has all the drawings; None if there is none, or a caption could not say it."""
    names = [part.object for part in parts]
    if len(set(names)) < len(names):
        return None
    for part in parts:
        said = part.colour or part.size or (len(part.places) > 1)
        if said and (part.object not in cast.things or not cast.plain(part.object)):
            return None
    turned = {part.object for part in parts if part.colour}

    def suits(style: str) -> bool:
        has = cast.drawn[style]
        lines = style in ("contrast", "mono") and any(part.colour == "white" for part in parts)
        return all(n in has and (n not in turned or has[n].can_turn) for n in names) and not lines

    styles = [style for style in STYLES if suits(style)]
    if not styles:
        return None
    return Scene(task=task, style=one_of(lots, styles), parts=tuple(parts), relation=relation)


def _grounded(scene: Scene, lots: random.Random) -> Scene | None:
    """A quarter of the scenes on a coloured ground; None where a thing would not show on it."""
    colours = {part.colour for part in scene.parts}
    ground = scene.ground
    if ground is None and lots.random() < (0.6 if "white" in colours else 0.22):
        ground = one_of(lots, COLOURS)
    is_lost = (ground is not None and ground in colours) or (
        ground == "black" and scene.style in ("contrast", "mono")
    )
    return None if is_lost else replace(scene, ground=None if ground == "white" else ground)


# Where things stand, in reading order.

_WHOLE, _MIDDLE = Place(0, 0, 1), Place(0.25, 0.25, 0.5)
_BESIDE = (Place(0, 0.25, 0.5), Place(0.5, 0.25, 0.5))
_STACKED = (Place(0.25, 0, 0.5), Place(0.25, 0.5, 0.5))
_CORNERS = tuple(Place(left, top, 0.5) for top in (0.0, 0.5) for left in (0.0, 0.5))
_TRIANGLES = ((_STACKED[0], *_CORNERS[2:]), (*_CORNERS[:2], _STACKED[1]))


def _laid(lots: random.Random, count: int) -> tuple[Place, ...]:
    """Two to four places: beside each other, above each other, or in two rows."""
    if count == 2:
        return _BESIDE if lots.random() < 0.75 else _STACKED
    return _CORNERS if count == 4 else one_of(lots, _TRIANGLES)


def _weighted(lots: random.Random, shares: Mapping[Kind, float]) -> Kind:
    ends = list(accumulate(shares.values()))
    return list(shares)[bisect(ends, lots.random() * ends[-1], hi=len(ends) - 1)]


_HATS = ("top hat", "crown", "graduation cap", "billed cap", "woman's hat", "rescue worker's helmet")
_HEADS = frozenset(
    (
        *(
            "dog face",
            "cat face",
            "cat",
            "dog",
            "pig face",
            "cow face",
            "mouse face",
            "rabbit face",
            "horse face",
        ),
        *(
            "monkey face",
            "tiger face",
            "bear",
            "panda",
            "fox",
            "lion",
            "koala",
            "frog",
            "wolf",
            "hamster",
            "owl",
        ),
        *(
            "polar bear",
            "penguin",
            "chicken",
            "robot",
            "alien",
            "ghost",
            "skull",
            "snowman",
            "teddy bear",
            "gorilla",
        ),
        *("raccoon", "grinning face", "smiling face", "clown face"),
    )
)
