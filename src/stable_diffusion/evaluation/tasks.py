"""The benchmark on a set: which prompts each task has, and what the judges say of all kinds of pictures of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from stable_diffusion.data.cache import Array
from stable_diffusion.data.item import Progress, Split
from stable_diffusion.evaluation.benchmark import (
    SEEDS,
    SINGLE,
    TASKS,
    Seen,
    Verdict,
    Verdicts,
    asked_of,
    is_plain,
    judge,
    look,
)
from stable_diffusion.evaluation.codec import round_trips
from stable_diffusion.evaluation.detector import Detector
from stable_diffusion.evaluation.features import MobileNetV2, feature_blocks, looks
from stable_diffusion.evaluation.pictures import Group, in_hash_order, pictures
from stable_diffusion.evaluation.probes import StyleProbe
from stable_diffusion.nn.vae import AutoencoderKL, AutoencoderTiny

STYLE = "style"
SHOWN = 12


@dataclass(frozen=True)
class Boxed:
    """A generated picture of a task's prompt beside the real scene, and what the detector sees in both."""

    caption: str
    right: bool
    generated: tuple[Array, list[Seen]]
    real: tuple[Array, list[Seen]]


def plain_splits(splits: Sequence[Split]) -> list[Split]:
    """The splits without scenes; those that hold nothing else are left out."""
    plain = [replace(split, entries=list(filter(is_plain, split.entries))) for split in splits]
    return [split for split in plain if split.entries]


def task_groups(splits: Sequence[Split], seed: int) -> list[Group]:
    """The prompts of each task: of the held-out splits that hold what is asked of it and nothing else.

    With them come single things: the plain drawings of the held-out split that has most of those whose object and
    style training knows, but not together. None for a set without scenes.
    """
    scenes = []
    for split in splits:
        tasks = split.field("task")
        if tasks is not None and not split.is_training and not any(map(is_plain, split.entries)):
            order = in_hash_order(split, seed)
            scenes += [
                Group(task, split, [row for row in order if tasks[row] == task])
                for task in dict.fromkeys(tasks)
            ]
    plain = plain_splits(splits)
    known = {pair for split in plain if split.is_training for pair in _pairs(split)}
    objects, styles = ({pair[i] for pair in known} for i in (0, 1))
    singles = []
    for split in plain:
        unseen = {
            row
            for row, pair in enumerate(_pairs(split))
            if pair not in known and pair[0] in objects and pair[1] in styles
        }
        if unseen and not split.is_training:
            rows = [row for row in in_hash_order(split, seed) if row in unseen]
            singles.append(Group(SINGLE, split, rows))
    found = [*scenes, *sorted(singles, key=lambda group: -len(group.rows))[:1]] if scenes else []
    return sorted(found, key=lambda group: list(TASKS).index(group.name) if group.name in TASKS else -1)


def _pairs(split: Split) -> list[tuple[str, str]]:
    """Each entry's object and style; nothing unless all have both."""
    objects, styles = split.field("object"), split.field("style")
    return [] if objects is None or styles is None else list(zip(objects, styles, strict=True))


@dataclass(frozen=True, kw_only=True)
class Judges:
    """What looks at pictures."""

    detector: Detector
    network: MobileNetV2
    styles: StyleProbe | None
    """Of the network's features; None where the set does not allow it."""

    def look(self, some: Iterable[Array], with_style: bool) -> Iterator[tuple[list[Seen], str | None]]:
        """The things in each picture, and its style."""
        if self.styles is None or not with_style:
            yield from ((seen, None) for seen in look(self.detector, some))
            return
        some, again = itertools.tee(some)
        blocks = map(self.styles.predict, map(looks, feature_blocks(self.network, again)))
        yield from zip(look(self.detector, some), itertools.chain.from_iterable(blocks), strict=True)


def task_verdicts(
    group: Group,
    captions: Sequence[str],
    made: Array,
    vae: AutoencoderKL | AutoencoderTiny,
    judges: Judges,
    seed: int,
) -> Generator[Progress, None, tuple[dict[str, dict[str, Verdicts]], list[Boxed]]]:
    """By task and kind of pictures, what is right in them; and some of them to show. Single things make two tasks.

    Args:
        group: the task's prompts.
        captions: those that pictures were generated of.
        made: ``SEEDS`` pictures of each.
        vae: of the round trips.
        judges: what looks at them.
        seed: of the shuffling.
    """
    rows = group.rows[: len(captions)]
    entries = [group.split.entries[row] for row in rows]
    asked = [asked_of(entry) for entry in entries]
    tasks: dict[str, Callable[[int, list[Seen], str | None], Verdict]] = {
        group.name: lambda i, seen, style: judge(asked[i], seen)
    }
    if group.name == SINGLE and judges.styles is not None:
        tasks[STYLE] = lambda i, seen, style: {
            "right": style == entries[i].fields["style"],
            "with the object": style == entries[i].fields["style"] and judge(asked[i], seen)["right"],
        }
    real = np.stack(list(pictures(group.split, len(made[0]), rows)))
    shuffled = np.random.default_rng(seed).permutation(len(rows)).tolist()
    verdicts: dict[str, dict[str, Verdicts]] = {task: {} for task in tasks}
    things = {}
    for kind, some in {"generated": made, "real": real, "round trips": round_trips(vae, real)}.items():
        each = SEEDS if kind == "generated" else 1
        found = []
        for one in judges.look(some, STYLE in tasks):
            found.append(one)
            yield Progress(f"{group.name}: {kind}", len(found), each * len(rows))
        things[kind] = [seen for seen, _ in found]
        orders = {kind: list(range(len(rows)))} | (
            {"shuffled captions": shuffled} if kind == "generated" else {}
        )
        for task, verdict in tasks.items():
            for name, order in orders.items():
                verdicts[task][name] = [
                    [verdict(j, *one) for one in found[i * each : (i + 1) * each]]
                    for i, j in enumerate(order)
                ]
    examples = [
        Boxed(
            captions[i],
            verdicts[group.name]["generated"][i][0]["right"],
            (made[i * SEEDS], things["generated"][i * SEEDS]),
            (real[i], things["real"][i]),
        )
        for i in range(min(SHOWN, len(rows)))
    ]
    return verdicts, examples
