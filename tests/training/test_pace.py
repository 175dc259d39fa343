"""A budget in minutes: measured as training runs, on a clock that steps move on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stable_diffusion.training.draw import Draw
from stable_diffusion.training.events import Replan, TrainStep
from stable_diffusion.training.pace import Pace
from tests.training.test_loop import SETTINGS, Toy, train


class Time:
    """A clock that steps move on."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Timed(Toy):
    """Its steps take `seconds(time)`."""

    def __init__(self, clock: Time, seconds: Any) -> None:
        super().__init__()
        self.clock, self.seconds = clock, seconds

    def batch(self, draw: Draw) -> tuple[Tensor, ...]:
        self.clock.now += self.seconds(self.clock.now - 100)
        return (torch.ones(len(draw.places), 3),)


def run_for(seconds: float, planned: int, speed: Any, folder: Path) -> tuple[list[Any], float]:
    """The events of a stage with a budget, and the seconds that it took."""
    clock = Time()
    pace = Pace(SETTINGS, planned, lambda: 100 + seconds - clock.now, clock)
    return list(train(Timed(clock, speed), folder / "c", pace=pace)), clock.now - 100


def test_a_machine_that_is_slow_at_first_makes_what_a_quick_one_does(tmp_path: Path) -> None:
    """45 minutes planned as 270 steps of ten seconds, which take half a second once the first minute is over."""
    events, seconds = run_for(2700, 270, lambda now: 10.0 if now < 60 else 0.5, tmp_path)
    steps = [event for event in events if isinstance(event, TrainStep)]
    assert 0.95 * 5286 < len(steps) < 1.05 * 5286 and 2500 < seconds < 2800
    changes = [event for event in events if isinstance(event, Replan)]
    assert changes and len(changes) < 5
    assert "toy: " in str(changes[-1]) and f"steps instead of {changes[-1].before}" in str(changes[-1])
    assert changes[-1].steps == steps[-1].total == len(steps)
    assert steps[-1].learning_rate < steps[0].learning_rate, "it falls to the end of the last plan"


def test_a_machine_that_becomes_slow_keeps_its_time(tmp_path: Path) -> None:
    events, seconds = run_for(1000, 2000, lambda now: 0.5 if now < 200 else 1.0, tmp_path)
    assert 900 < seconds < 1150 and len(events) < 1400


def test_a_short_pause_changes_no_plan(tmp_path: Path) -> None:
    events, _ = run_for(500, 1000, lambda now: 5.0 if 200 < now < 215 else 0.5, tmp_path)
    assert not [event for event in events if isinstance(event, Replan)] and len(events) == 1000


def test_a_plan_changes_late_only_where_the_rate_has_not_fallen_far(tmp_path: Path) -> None:
    """What little time is left over is not worth a rate that falls twice; what a busy start took is."""
    events, _ = run_for(100, 100, lambda now: 1.0 if now < 90 else 0.2, tmp_path / "late")
    assert len(events) == 100
    events, seconds = run_for(100, 5, lambda now: 10.0 if now < 40 else 0.1, tmp_path / "busy")
    steps = [event for event in events if isinstance(event, TrainStep)]
    assert len(steps) > 400 and seconds < 110


def test_steps_that_were_asked_for_are_made_whatever_the_time(tmp_path: Path) -> None:
    clock = Time()
    pace = Pace(SETTINGS, 30, None, clock)
    assert len(list(train(Timed(clock, lambda now: 1000 - now % 7), tmp_path / "c", pace=pace))) == 30
