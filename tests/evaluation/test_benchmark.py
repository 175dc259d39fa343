"""Laws of the benchmark's judges: what must make a picture right or wrong, on what a detector might have seen."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from stable_diffusion.data.item import Entry, Split
from stable_diffusion.errors import InputError
from stable_diffusion.evaluation.benchmark import (
    SEEDS,
    TASKS,
    Asked,
    Box,
    Seen,
    Thing,
    Verdict,
    asked_of,
    benchmark_of,
    judge,
)
from stable_diffusion.evaluation.detector import Found
from stable_diffusion.evaluation.tasks import plain_splits, task_groups

FOX, CAR = Thing(name="fox", colour="red"), Thing(name="car", colour="blue")
LEFT, RIGHT, TOP, BOTTOM = (4, 36, 60, 92), (68, 36, 124, 92), (36, 4, 92, 60), (36, 68, 92, 124)


def seen(name: str, box: Box = LEFT, colour: str = "grey", also: tuple[str, ...] = ()) -> Seen:
    """A thing with that name, or a few."""
    return Seen(found=Found(box=box, probability=0.9, names=(*also, name)), colour=colour)


def asks(task: str, *things: Thing, relation: str | None = None) -> Asked:
    return Asked(task=task, things=things, relation=relation)


def mirrored(things: list[Seen]) -> list[Seen]:
    boxes = [(128 - t.found.box[2], t.found.box[1], 128 - t.found.box[0], t.found.box[3]) for t in things]
    return [replace(t, found=replace(t.found, box=box)) for t, box in zip(things, boxes, strict=True)]


def transposed(things: list[Seen]) -> list[Seen]:
    boxes = [tuple(t.found.box[i] for i in (1, 0, 3, 2)) for t in things]
    return [replace(t, found=replace(t.found, box=box)) for t, box in zip(things, boxes, strict=True)]


def right(asked: Asked, things: list[Seen]) -> bool:
    return judge(asked, things)["right"]


def test_nothing_is_never_right() -> None:
    for task in TASKS:
        asked = asks(task, FOX, CAR, relation="left of")
        assert not any(judge(asked, []).values()), task


def test_single_is_the_largest_thing_under_any_of_its_names() -> None:
    asked = asks("single", FOX)
    assert judge(asked, [seen("fox")]) == {"right": True, "first name": True}
    assert judge(asked, [seen("fox", also=("wolf",))]) == {"right": True, "first name": False}
    assert not right(asked, [seen("car"), seen("fox")]), "the fox is the smaller one"
    assert judge(replace(asked, task="synonym"), [seen("fox")]) == judge(asked, [seen("fox")])


def test_two_things_need_two_boxes() -> None:
    """One box that goes by both names is one thing."""
    asked = asks("two", FOX, CAR)
    assert right(asked, [seen("car", RIGHT), seen("fox")])
    assert right(asked, [seen("car", also=("fox",)), seen("fox", RIGHT)])
    assert judge(asked, [seen("car", also=("fox",))]) == {"right": False, "one of them": True}
    assert not right(asked, [seen("fox"), seen("fox", RIGHT)])


def test_counting_counts_the_asked_thing_alone() -> None:
    boxes = (LEFT, RIGHT, TOP, BOTTOM)
    for number in (2, 3, 4):
        asked = asks("counting", *[FOX] * number)
        for shown in range(1, 5):
            things = [seen("fox", box) for box in boxes[:shown]]
            assert right(asked, things) == (shown == number)
            assert right(asked, [*things, seen("car")]) == (shown == number)
        verdict = judge(asked, [seen("car", box) for box in boxes[:number]])
        assert verdict == {"right": False, "object": False, "number of things": True}


def test_colour_needs_the_thing_and_its_colour() -> None:
    asked = asks("colour", FOX)
    cases = {
        ("fox", "red"): (True, True, True),
        ("fox", "blue"): (False, True, False),
        ("car", "red"): (False, False, True),
    }
    for (name, colour), verdict in cases.items():
        assert tuple(judge(asked, [seen(name, colour=colour)]).values()) == verdict


@pytest.mark.parametrize(
    ("relation", "opposite", "boxes"),
    [
        ("left of", "right of", (LEFT, RIGHT)),
        ("above", "below", (TOP, BOTTOM)),
        ("on top of", "below", (TOP, BOTTOM)),
    ],
)
def test_exchanging_two_things_turns_their_position(
    relation: str, opposite: str, boxes: tuple[Box, Box]
) -> None:
    things = [seen("fox", boxes[0]), seen("car", boxes[1])]
    exchanged = [seen("fox", boxes[1]), seen("car", boxes[0])]
    there, back = (asks("position", FOX, CAR, relation=name) for name in (relation, opposite))
    assert (right(there, things), right(there, exchanged)) == (True, False)
    assert (right(back, things), right(back, exchanged)) == (False, True)
    assert right(asks("position", CAR, FOX, relation=opposite), things)
    assert right(there, things[::-1]), "the detector's order does not count"
    assert not right(there, things[:1]), "one of them is missing"
    flip = mirrored if relation == "left of" else lambda some: transposed(mirrored(transposed(some)))
    assert not right(there, flip(things)) and right(back, flip(things))
    assert not right(there, transposed(things)) and not right(back, transposed(things))
    assert judge(there, transposed(things))["objects"]


def test_things_in_one_place_have_no_position() -> None:
    for relation in ("left of", "right of", "above", "below"):
        asked = asks("position", FOX, CAR, relation=relation)
        assert not right(asked, [seen("fox", (30, 30, 90, 90)), seen("car", (34, 34, 94, 94))])


def test_between_is_in_the_middle() -> None:
    tree = Thing(name="tree")
    boxes = {"fox": (44, 40, 84, 80), "car": (0, 30, 40, 70), "tree": (88, 50, 128, 90)}
    things = [seen(name, box) for name, box in boxes.items()]
    assert right(asks("position", FOX, CAR, tree, relation="between"), things)
    assert not right(asks("position", CAR, FOX, tree, relation="between"), things)


def test_binding_needs_each_colour_on_its_thing() -> None:
    asked = asks("binding", FOX, CAR)
    bound = [seen("fox", LEFT, "red"), seen("car", RIGHT, "blue")]
    leaked = [seen("fox", LEFT, "blue"), seen("car", RIGHT, "red")]
    assert judge(asked, bound) == {"right": True, "objects": True, "colours": True}
    assert judge(asked, leaked) == {"right": False, "objects": True, "colours": True}
    assert not right(asked, bound[:1])
    assert judge(asked, [seen("fox", LEFT, "red"), seen("car", RIGHT, "red")])["colours"] is False


def test_what_entries_ask_for() -> None:
    entry = Entry(
        key="1.png",
        captions=("a red fox left of a car",),
        fields={
            "task": "position",
            "things": [{"object": "fox", "colour": "red", "box": [0, 0, 9, 9]}, {"object": "car"}],
            "relation": "left of",
        },
    )
    assert asked_of(entry) == asks("position", FOX, Thing(name="car"), relation="left of")
    plain = Entry(key="2.png", captions=("a fox",), fields={"object": "fox"})
    assert asked_of(plain) == asks("single", Thing(name="fox"))
    for change in (
        {"task": "tasks"},
        {"task": ["position"]},
        {"things": "fox"},
        {"things": []},
        {"things": [{"colour": "red"}]},
        {"relation": None},
        {"relation": "inside"},
        {"relation": "between"},
    ):
        with pytest.raises(InputError, match=r"1\.png: its task, things and relation"):
            asked_of(replace(entry, fields={**entry.fields, **change}))


class Nothing:
    """A source whose pictures nobody looks at."""

    def entries(self) -> list[Entry]:
        return []

    def image(self, key: str) -> Image.Image:
        raise AssertionError(key)


def split(name: str, *fields: dict[str, object]) -> Split:
    entries = [Entry(key=f"{name} {i}", captions=("a",), fields=some) for i, some in enumerate(fields)]
    return Split(name=name, source=Nothing(), entries=entries)


def test_prompts_are_of_scenes_and_of_pairs_that_training_lacks() -> None:
    def plain(thing: str, style: str) -> dict[str, object]:
        return {"object": thing, "style": style, **({"task": "single"} if style == "flat" else {})}

    train = split("train", plain("fox", "noto"), plain("car", "flat"), {"task": "two"})
    scenes = split("train_scenes", {"task": "two"}, {"task": "single", "things": []})
    two = split("test_a", {"task": "two"}, {"task": "two"})
    colour = split("test_b", {"task": "colour"})
    val = split("val", plain("fox", "noto"), plain("fox", "flat"), plain("owl", "flat"), plain("fox", "line"))
    style = split("test_c", plain("fox", "flat"), plain("car", "noto"), plain("car", "flat"))
    splits = [train, scenes, two, colour, val, style]
    found = task_groups(splits, seed=0)
    assert [(g.name, g.split.name, sorted(g.rows)) for g in found] == [
        ("single", "test_c", [0, 1]),
        ("two", "test_a", [0, 1]),
        ("colour", "test_b", [0]),
    ]
    assert [(s.name, len(s.entries)) for s in plain_splits(splits)] == [
        ("train", 2),
        ("val", 4),
        ("test_c", 3),
    ]
    assert task_groups([train, val, style], seed=0) == [], "a set without scenes is scored as before"


def test_intervals_are_over_prompts() -> None:
    """Four pictures that agree are no more evidence than one; the overall score is the tasks' mean."""
    random = np.random.default_rng(0)
    rates = random.random(100) < 0.3
    one: list[list[Verdict]] = [[{"right": bool(rate)}] for rate in rates]
    four = [some * SEEDS for some in one]
    all_right = [[{"right": True}] * SEEDS for _ in range(10)]
    scores = benchmark_of(
        {"two": {"generated": four, "real": one}, "single": {"generated": all_right}}, "x", 0
    )
    generated, real = (scores.tasks[0].scores[kind]["right"] for kind in ("generated", "real"))
    assert generated.value == real.value == rates.mean()
    assert (generated.low, generated.high) == (real.low, real.high)
    assert generated.high - generated.low == pytest.approx(2 * 1.96 * np.sqrt(0.3 * 0.7 / 100), rel=0.2)
    assert scores.overall["generated"].value == pytest.approx((rates.mean() + 1) / 2)
    assert scores.overall["generated"].high <= 1 and scores.tasks[1].scores["generated"]["right"].low == 1
