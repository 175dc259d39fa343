"""The scores of one group of pictures: what was learned from the real pictures judges all kinds of them alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stable_diffusion.data.cache import Array
from stable_diffusion.data.item import Split
from stable_diffusion.evaluation.distances import MEMORISED, KernelDistance, Nearest, kernel_distance, nearest
from stable_diffusion.evaluation.features import looks, pooled
from stable_diffusion.evaluation.pictures import Group
from stable_diffusion.evaluation.probes import ObjectProbe, StyleProbe, fit_objects, fit_styles

AMONG = 5  # nearest objects
KINDS = ("generated", "real", "round trips", "blurred")


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Of one kind of pictures; None where a score does not apply."""

    kernel_distance: KernelDistance | None = None
    """From the group's real pictures, in MobileNetV2 features."""
    object_top1: float | None = None
    """Share of the pictures whose asked object is the nearest of all."""
    object_top5: float | None = None
    """Share of the pictures whose asked object is among the five nearest."""
    style: float | None = None
    """Share of the pictures in the asked style."""
    nearest_ratio: float | None = None
    """Median of the distance to the nearest training picture over that to the second nearest."""
    memorised: float | None = None
    """Share of the pictures where this ratio is below 1/3."""


@dataclass(frozen=True, kw_only=True)
class Judge:
    """What was learned from the real pictures; None where the set or the model does not allow it."""

    objects: ObjectProbe | None = None
    trained: frozenset[str] = frozenset()
    """Objects of the training split: the others' class means are of the held-out pictures."""
    styles: StyleProbe | None = None
    training: Array | None = None
    """Pooled features of the training pictures."""
    left_out: tuple[str, ...] = ()
    """What cannot be judged, and why."""

    def ranks(self, x: Array, asked: Sequence[str], real: Array, training: bool) -> Array:
        """Objects nearer than the asked one; the real picture is taken out of a mean that it is a part of.

        Args:
            x: ``looks`` of the pictures.
            asked: the object that each should show.
            real: ``looks`` of the real pictures whose captions were asked for.
            training: whether these are of the training split.
        """
        assert self.objects is not None
        ranks = np.zeros(len(asked), dtype=np.int64)
        inside = np.array([training or name not in self.trained for name in asked])
        for mask, left_out in ((inside, real), (~inside, None)):
            rows = np.flatnonzero(mask).tolist()
            names = [asked[row] for row in rows]
            ranks[rows] = self.objects.ranks(x[rows], names, None if left_out is None else left_out[rows])
        return ranks


@dataclass(frozen=True)
class Judged:
    """A group's scores, by the kind of pictures; and of the generated ones what the page shows."""

    scores: dict[str, Scores]
    ranks: Array | None
    near: Nearest | None


def learn(splits: Sequence[Split], features: dict[str, Array], reads_text: bool) -> Judge:
    """Fits what the set allows; ``features`` are of all pictures of each split."""
    training = next((split for split in splits if split.is_training), None)
    if training is None:
        what = "objects, styles, nearest training pictures and the linear code"
        return Judge(left_out=(f"{what}: the set has no training split",))
    x = features[training.name]
    near = pooled(x) if len(x) > 1 else None
    if not reads_text:
        return Judge(training=near, left_out=("objects and styles: the model reads no text",))
    asked = {what: training.field(what) for what in ("object", "style")}
    left_out = [
        f"{what}s: not every training picture has the field {what!r}"
        for what, values in asked.items()
        if values is None
    ]
    objects = None
    if (trained := asked["object"]) is not None:
        objects = fit_objects(looks(x), trained)
        others = {split.name: split.field("object") for split in splits if not split.is_training}
        named = {name: values for name, values in others.items() if values is not None}
        if named:  # together, so that one mean is of all pictures of an object
            rest = np.concatenate([looks(features[name]) for name in named])
            objects = objects.with_objects(rest, [value for values in named.values() for value in values])
    return Judge(
        objects=objects,
        trained=frozenset(trained or ()),
        styles=None if asked["style"] is None else fit_styles(looks(x), asked["style"]),
        training=near,
        left_out=tuple(left_out),
    )


def judge(
    learned: Judge, group: Group, rows: list[int], kinds: dict[str, Array], all_real: Array, seed: int
) -> Judged:
    """The scores of every kind of pictures of the same captions.

    Args:
        learned: what judges.
        group: the group, and
        rows: those of its pictures whose captions were asked for.
        kinds: features of each of ``KINDS``.
        all_real: features of all real pictures of the group's split.
        seed: of the bootstrap and of the shuffling.
    """
    split, real = group.split, kinds["real"]
    objects, styles = split.field("object"), split.field("style")
    shuffled = np.random.default_rng(seed).permutation(len(rows))
    judged = {kind: (kinds[kind], np.arange(len(rows))) for kind in KINDS}
    judged["shuffled captions"] = kinds["generated"], shuffled
    half = min(len(rows), len(group.rows) // 2)
    halves = [pooled(all_real[group.rows[start : start + half]]) for start in (0, half)]
    result, ranks_of, near_of = {}, {}, {}
    for kind, (x, order) in judged.items():
        scores: dict[str, Any] = {}
        if kind == "real":
            scores["kernel_distance"] = kernel_distance(halves[0], halves[1], seed) if half > 1 else None
        elif order is not shuffled:
            scores["kernel_distance"] = kernel_distance(pooled(x), pooled(real), seed)
        if learned.objects is not None and objects is not None:
            asked = [objects[rows[i]] for i in order]
            ranks = ranks_of[kind] = learned.ranks(looks(x), asked, looks(real)[order], split.is_training)
            scores |= {f"object_top{n}": float((ranks < n).mean()) for n in (1, AMONG)}
        if learned.styles is not None and styles is not None:
            found = learned.styles.predict(looks(x))
            right = [name == styles[rows[i]] for name, i in zip(found, order, strict=True)]
            scores["style"] = float(np.mean(right))
        # A real training picture is its own nearest one.
        own = kind == "real" and split.is_training
        if learned.training is not None and order is not shuffled and not own:
            near = near_of[kind] = nearest(pooled(x), learned.training)
            scores["nearest_ratio"] = float(np.median(near.ratio))
            scores["memorised"] = float((near.ratio < MEMORISED).mean())
        result[kind] = Scores(**scores)
    if result["shuffled captions"] == Scores():
        del result["shuffled captions"]
    return Judged(result, ranks_of.get("generated"), near_of.get("generated"))
