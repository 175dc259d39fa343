"""A benchmark of what prompts ask for together: the tasks of GenEval (Ghosh et al. 2023), on icons.

A prompt asks for things, their number, colours and places. A detector says which things a picture shows and where,
their pixels say in which colour, and each task has a judge that compares both. The same judges look at the real scenes
that the prompts describe, which is the most that a score can reach.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stable_diffusion.data.cache import Array
from stable_diffusion.data.item import Entry
from stable_diffusion.errors import InputError, shown
from stable_diffusion.evaluation.colours import thing_colours
from stable_diffusion.evaluation.detector import Detector, Found, detect

SINGLE = "single"
SEEDS = 4
"""Pictures of each prompt."""
RESAMPLES = 1000
MARGIN = 0.1
"""Of two boxes' sides together, that their centres must be apart; as in GenEval."""
DIRECTION = 0.5
"""Least part of the way between two centres that goes in the asked direction; as in GenEval, 60 degrees each side."""


@dataclass(frozen=True, kw_only=True)
class Thing:
    """What a prompt asks for."""

    name: str
    colour: str | None = None


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a prompt asks for, and the task that it belongs to."""

    task: str
    things: tuple[Thing, ...]
    """In the prompt's order."""
    relation: str | None = None
    """Of the first thing to the others: one of ``RELATIONS``."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One thing in a picture."""

    found: Found
    colour: str

    def shows(self, thing: Thing, *, coloured: bool = False) -> bool:
        """Whether it may be what is asked for: the name is among those found, and the colour right where it counts."""
        return thing.name in self.found.names and (not coloured or thing.colour in (None, self.colour))


Verdict = dict[str, bool]
"""What is right in a picture: ``right`` is the task's score, the rest says where it fails."""
Verdicts = Sequence[Sequence[Verdict]]
"""Of the pictures of each prompt."""


def is_plain(entry: Entry) -> bool:
    """Whether it is no scene and no test of words: a picture without a task, or the drawing of one ``object``."""
    task = entry.fields.get("task")
    return task is None or (task == SINGLE and isinstance(entry.fields.get("object"), str))


def asked_of(entry: Entry) -> Asked:
    """What the entry's fields ``task``, ``things`` and ``relation`` say; of a plain drawing its object.

    Raises:
        InputError: they are not of the form that ``docs/benchmark.md`` describes.
    """
    fields: Mapping[str, Any] = entry.fields
    if is_plain(entry):
        return Asked(task=SINGLE, things=(Thing(name=fields["object"]),))
    task = fields["task"]
    try:
        things = [Thing(name=thing["object"], colour=thing.get("colour")) for thing in fields["things"]]
    except (KeyError, TypeError, AttributeError):
        things = []
    asked = Asked(task=str(task), things=tuple(things), relation=fields.get("relation"))
    needed = 3 if asked.relation == "between" else 2 if task in ("two", "position", "binding") else 1
    known = asked.task in TASKS and (asked.task != "position" or asked.relation in RELATIONS)
    if not known or len(things) < needed:
        raise InputError(
            f"{entry.key}: its task, things and relation must be as docs/benchmark.md says, got {shown(fields)}"
        )
    return asked


def look(detector: Detector, pictures: Iterable[Array]) -> Iterator[list[Seen]]:
    """What each of the pictures shows, the largest first."""
    pictures, again = itertools.tee(pictures)
    for picture, found in zip(again, detect(detector, pictures), strict=True):
        colours = thing_colours(picture, [thing.box for thing in found])
        yield [Seen(found=thing, colour=colour) for thing, colour in zip(found, colours, strict=True)]


def judge(asked: Asked, seen: Sequence[Seen]) -> Verdict:
    """What is right in a picture that shows these things."""
    return TASKS[asked.task](asked, seen)


def _one(asked: Asked, seen: Sequence[Seen]) -> Verdict:
    """The largest thing is the asked one."""
    name = asked.things[0].name
    first = seen[0].found.names if seen else ()
    return {"right": name in first, "first name": name in first[:1]}


def _synonym(asked: Asked, seen: Sequence[Seen]) -> Verdict:
    return _one(asked, seen) if len(asked.things) == 1 else _together(asked, seen)


def _together(asked: Asked, seen: Sequence[Seen]) -> Verdict:
    """Each asked thing has a box of its own."""
    either = [any(one.shows(thing) for one in seen) for thing in asked.things]
    return {"right": any(_placed(asked, seen)), "one of them": any(either)}


def _counting(asked: Asked, seen: Sequence[Seen]) -> Verdict:
    """As many boxes as asked for show the thing."""
    thing, number = asked.things[0], len(asked.things)
    shown = sum(one.shows(thing) for one in seen)
    return {"right": shown == number, "object": shown > 0, "number of things": len(seen) == number}


def _colour(asked: Asked, seen: Sequence[Seen]) -> Verdict:
    """The largest thing is the asked one in the asked colour."""
    thing = asked.things[0]
    named, coloured = (seen[0].shows(thing), seen[0].colour == thing.colour) if seen else (False, False)
    return {"right": named and coloured, "object": named, "colour": coloured}


def _position(asked: Asked, seen: Sequence[Seen]) -> Verdict:
    """The asked things stand to each other as asked."""
    placed = list(_placed(asked, seen))
    related = [RELATIONS[str(asked.relation)]([one.found.box for one in some]) for some in placed]
    return {"right": any(related), "objects": bool(placed)}


def _binding(asked: Asked, seen: Sequence[Seen]) -> Verdict:
    """Each asked thing has a box of its own, in its colour."""
    colours = {one.colour for one in seen}
    return {
        "right": any(_placed(asked, seen, coloured=True)),
        "objects": any(_placed(asked, seen)),
        "colours": all(thing.colour in colours for thing in asked.things),
    }


def _placed(asked: Asked, seen: Sequence[Seen], coloured: bool = False) -> Iterator[tuple[Seen, ...]]:
    """Every choice of a thing of its own for each asked one."""
    fit = [[one for one in seen if one.shows(thing, coloured=coloured)] for thing in asked.things]
    return (some for some in itertools.product(*fit) if len(set(map(id, some))) == len(some))


Box = tuple[float, float, float, float]


def _towards(a: Box, b: Box) -> tuple[float, float]:
    """How far, from -1 to 1, `a` lies to the right of and below `b`; 0 within ``MARGIN``. GenEval's rule."""
    offsets = [(a[i] + a[i + 2] - b[i] - b[i + 2]) / 2 for i in (0, 1)]
    sides = [a[i + 2] - a[i] + b[i + 2] - b[i] for i in (0, 1)]
    way = math.hypot(*offsets) or 1.0
    x, y = (
        math.copysign(max(abs(offset) - MARGIN * side, 0), offset) / way
        for offset, side in zip(offsets, sides, strict=True)
    )
    return x, y


def _between(boxes: Sequence[Box]) -> bool:
    """From the first thing, the two others lie in directions more than 120 degrees apart."""
    middle, *others = (((box[0] + box[2]) / 2, (box[1] + box[3]) / 2) for box in boxes[:3])
    a, b = (np.subtract(other, middle) for other in others)
    return bool(a @ b < -DIRECTION * np.linalg.norm(a) * np.linalg.norm(b))


RELATIONS: dict[str, Callable[[Sequence[Box]], bool]] = {
    "left of": lambda boxes: _towards(boxes[0], boxes[1])[0] < -DIRECTION,
    "right of": lambda boxes: _towards(boxes[0], boxes[1])[0] > DIRECTION,
    "above": lambda boxes: _towards(boxes[0], boxes[1])[1] < -DIRECTION,
    "below": lambda boxes: _towards(boxes[0], boxes[1])[1] > DIRECTION,
    "on top of": lambda boxes: _towards(boxes[0], boxes[1])[1] < -DIRECTION,
    "between": _between,
}
"""Whether boxes, in the prompt's order, stand so."""

TASKS: dict[str, Callable[[Asked, Sequence[Seen]], Verdict]] = {
    SINGLE: _one,
    "two": _together,
    "counting": _counting,
    "colour": _colour,
    "position": _position,
    "binding": _binding,
    "synonym": _synonym,
}
"""In the order of tables."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """Of pictures where something is right, with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class TaskScores:
    """Of one task."""

    task: str
    prompts: int
    scores: dict[str, dict[str, Share]]
    """By the kind of pictures, then by what is right in them."""


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """The scores of all tasks."""

    detector: str
    """Digest of its weights: scores by another detector are others."""
    seeds: int
    """Pictures of each prompt."""
    tasks: tuple[TaskScores, ...]
    overall: dict[str, Share]
    """The mean of the tasks' scores, each counting alike as in GenEval, by the kind of pictures."""


def benchmark_of(verdicts: Mapping[str, Mapping[str, Verdicts]], detector: str, seed: int) -> Benchmark:
    """The scores of verdicts by task and kind of pictures.

    The bootstrap resamples prompts: pictures of one prompt succeed or fail together.
    """
    tasks, means = [], defaultdict[str, list[Array]](list)
    for number, (task, kinds) in enumerate(verdicts.items()):
        scores: dict[str, dict[str, Share]] = {}
        for kind, of_prompts in kinds.items():
            names = list(of_prompts[0][0])
            rates = np.array(
                [[np.mean([one[name] for one in some]) for name in names] for some in of_prompts]
            )
            # Each row: first the mean itself, then those of resampled prompts.
            resampled = (
                np.vstack([np.ones(len(rates)), _resamples(len(rates), seed + number)]) @ rates / len(rates)
            )
            scores[kind] = {name: _share(resampled[:, i]) for i, name in enumerate(names)}
            means[kind].append(resampled[:, names.index("right")])
        tasks.append(TaskScores(task=task, prompts=len(rates), scores=scores))
    overall = {kind: _share(np.mean(some, axis=0)) for kind, some in means.items()}
    return Benchmark(detector=detector, seeds=SEEDS, tasks=tuple(tasks), overall=overall)


def _resamples(prompts: int, seed: int) -> Array:
    """How often each prompt is in each of the resamples."""
    return np.random.default_rng(seed).multinomial(prompts, np.full(prompts, 1 / prompts), RESAMPLES)


def _share(means: Array) -> Share:
    low, high = np.quantile(means[1:], [0.025, 0.975])
    return Share(value=float(means[0]), low=float(low), high=float(high))
