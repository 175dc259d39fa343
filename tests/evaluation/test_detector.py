"""The detector: what its maps say is read as they were meant, and it learns a few real drawings in seconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from stable_diffusion.evaluation.detector import (
    STRIDE,
    Detector,
    boxes_of,
    detect,
    distinct,
    intersection_over_union,
    load_detector,
)
from stable_diffusion.evaluation.detector_training import generalised, images_of, spoilt, targets_of, train
from stable_diffusion.evaluation.features import load_network
from stable_diffusion.evaluation.scenes import Composer, Scene, cut_out
from tests.evaluation.real import NAMES, beside, drawings
from tools.train_detector import write


def test_boxes_that_share() -> None:
    a = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10], [0, 0, 10, 10]])
    b = torch.tensor([[0.0, 0, 10, 10], [5, 0, 15, 10], [20, 0, 30, 10]])
    assert intersection_over_union(a, b).tolist() == pytest.approx([1, 1 / 3, 0])
    assert generalised(a, b).tolist() == pytest.approx([1, 1 / 3, -1 / 3])


def test_of_boxes_of_one_thing_the_surest_stays() -> None:
    """Those that lie on each other, or one in the other; not those that touch, nor a corner."""
    boxes = torch.tensor(
        [[0.0, 0, 20, 20], [1, 1, 21, 21], [4, 4, 9, 9], [20, 0, 30, 10], [18, 15, 24, 40], [25, 4, 40, 9]]
    )
    probabilities = torch.tensor([0.5, 0.9, 0.8, 0.6, 0.4, 0.3])
    assert distinct(boxes, probabilities).tolist() == [1, 3, 4, 5]


def test_targets_are_read_back_as_the_boxes_that_they_are_of() -> None:
    """Every cell that learns a box gives it back from its own distances; each thing has one centre."""
    boxes = np.array([[3, 5, 60, 70], [70, 80, 110, 120], [90, 2, 120, 30]], dtype=np.float32)
    one = Scene(pixels=np.zeros((128, 128, 3), dtype=np.uint8), boxes=boxes, labels=np.array([4, 5, 6]))
    targets = targets_of([one, one])
    assert (targets.centres == 1).sum() == 6
    number, rows, columns = targets.cells.T
    middles = STRIDE * (torch.stack([columns, rows, columns, rows], dim=1) + 0.5)
    sides = (targets.boxes - middles) * torch.tensor([-1, -1, 1, 1])
    assert (sides > 0).all(), "cells lie inside the boxes that they learn"
    torch.testing.assert_close(boxes_of(sides, rows, columns), targets.boxes)
    weights = torch.zeros(2, 7).index_put_((number, targets.labels), targets.weights, accumulate=True)
    torch.testing.assert_close(weights[:, 4:], torch.ones(2, 3))


def test_scenes_have_what_their_boxes_say() -> None:
    """Outside the boxes there is ground alone, and every box is filled to its sides."""
    composer, random = Composer(cut_out(drawings(), range(8)), 128), np.random.default_rng(0)
    on_white = 0
    for _ in range(60):
        one = composer.scene(random)
        assert one.boxes.min() >= 0 and one.boxes.max() <= 128 and len(one.boxes) == len(one.labels) <= 9
        if (one.pixels[[0, -1]] == 255).all():
            on_white += 1
            inside = np.zeros((128, 128), dtype=bool)
            for left, top, right, bottom in one.boxes.astype(int):
                inside[top:bottom, left:right] = True
                assert (one.pixels[top:bottom, left:right] < 250).any()
            assert (one.pixels[~inside] == 255).all()
    assert on_white > 15


def test_the_same_seed_gives_the_same_scenes() -> None:
    sprites = cut_out(drawings(), range(8))
    first, second = (Composer(sprites, 128).scene(np.random.default_rng(3)) for _ in range(2))
    assert (first.pixels == second.pixels).all() and (first.boxes == second.boxes).all()


def test_spoiling_leaves_pictures_what_they_are() -> None:
    composer, random = Composer(cut_out(drawings(), range(8)), 128), np.random.default_rng(0)
    x = images_of([composer.scene(random) for _ in range(16)])
    y = spoilt(x, None, random, torch.Generator().manual_seed(0))
    assert y.shape == x.shape and y.abs().max() <= 1
    assert 0.001 < (x - y).abs().mean() < 0.2


def test_it_learns_drawings_in_seconds_and_is_read_again(tmp_path: Path) -> None:
    """Eight of them; what is written finds things as what was trained does."""
    sprites = cut_out(drawings(), range(8))
    steps = train(sprites, NAMES, None, load_network(), steps=50, batch=8)
    losses = []
    while True:
        try:
            losses.append(next(steps)[1])
        except StopIteration as end:
            detector: Detector = end.value
            break
    assert losses[-1]["names"] < 0.6 * losses[0]["names"]
    write(detector, tmp_path)
    again = load_detector(tmp_path)
    three, two = detect(again, [beside(["baby chick"] * 3), beside(["hamburger", "anchor"])])
    assert [found.names[0] for found in three] == ["baby chick"] * 3
    for left, top in ((3, 3), (67, 3), (3, 67)):
        box = torch.tensor([left, top, left + 58, top + 58])
        assert max(float(intersection_over_union(box, torch.tensor(found.box))) for found in three) > 0.6
    assert "anchor" in {found.names[0] for found in two} and len(two) == 2
