"""What the tests of training look at: events, weights, checkpoints."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from stable_diffusion.training.events import Plan, TrainStep


class Record:
    """An observer that keeps every event, and can stop the training after a step of a stage."""

    def __init__(self, stage: str | None = None, step: int = -1) -> None:
        self.stop = (stage, step)
        self.events: list[object] = []

    def __call__(self, event: object) -> bool:
        self.events.append(event)
        return isinstance(event, TrainStep) and (event.stage, event.index) == self.stop

    @property
    def plan(self) -> Plan:
        """What the run began with."""
        (plan,) = (event for event in self.events if isinstance(event, Plan))
        return plan

    def stage(self, name: str) -> list[TrainStep]:
        return [event for event in self.events if isinstance(event, TrainStep) and event.stage == name]

    def curve(self, name: str) -> list[tuple[int, float | None, float]]:
        return [(step.index, step.loss, step.learning_rate) for step in self.stage(name)]


State = Mapping[str, torch.Tensor]


def copied(state: State) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def differing(a: State, b: State) -> list[str]:
    """Names of the tensors that are not the same, bit for bit."""
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]
