"""What a stage of training is: its settings, its players, and the contract that the loop relies on."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import torch
from torch import Tensor, nn

from stable_diffusion.errors import InputError, shown
from stable_diffusion.fields import ABOVE_0, Rule, Settings, within
from stable_diffusion.nn.blocks import Placed
from stable_diffusion.training.draw import Draw
from stable_diffusion.training.events import TrainStep
from stable_diffusion.training.workspace import Workspace

COOLDOWN = 0.4  # last part of the steps, over which the learning rate falls to 0

Batch = tuple[Tensor, ...]
Count = Annotated[int, within(1, 10**9)]
Decay = Annotated[float, Rule("from 0 to below 1", lambda decay: 0 <= decay < 1)]


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings(Settings):
    """How one player's weights are updated, by AdamW."""

    learning_rate: Annotated[float, within(0, 10)] = 1e-3
    schedule: Literal["cooldown", "constant"] = "cooldown"
    """After the warm-up: constant, then a linear fall to 0 over the last 40 % of the steps; or constant."""
    warmup_steps: Annotated[int, within(0, 10**9)] = 100
    """Steps of linear warm-up, at most a tenth of all."""
    weight_decay: Annotated[float, within(0, 1000)] = 0.01
    """Of matrices and kernels; biases and norms have none."""
    max_grad_norm: Annotated[float, ABOVE_0] = 1.0

    def rate(self, step: int, total: int) -> float:
        """The learning rate of a step."""
        warmup = min(1.0, (step + 1) / max(1, min(self.warmup_steps, total // 10)))
        fall = min(1.0, (total - step) / max(1.0, COOLDOWN * total))
        return self.learning_rate * warmup * (fall if self.schedule == "cooldown" else 1.0)


@dataclass(frozen=True, kw_only=True)
class StageSettings(OptimizerSettings):
    """One stage of training: what is optimised, and for how long."""

    kind: str = ""
    """A row of `training.stages.STAGES`."""
    name: str = ""
    """Of its random numbers, checkpoint and log; by default the kind."""
    epochs: Annotated[float, within(1e-6, 10**6)] = 10.0
    """Epochs over the pictures, unless steps or minutes are given."""
    min_steps: Count = 1000
    """Optimizer steps that even the smallest set gets."""
    batch_size: Annotated[int, within(1, 2**20)] = 64
    """Of all processes and micro-batches together; no more than the set has pictures."""
    gradient_accumulation_steps: Count = 1
    """Micro-batches of an optimizer step, one after the other: less memory. Batch statistics are a micro-batch's."""
    ema_decay: Decay = 0.999
    """Upper limit of the average's decay, which grows from 0: min(decay, (1 + step) / (10 + step))."""

    def check(self) -> None:
        """Raises InputError where the name is none of a file, or a batch has too few samples."""
        object.__setattr__(self, "name", self.name or self.kind)
        if not re.fullmatch(r"[\w-]{1,40}", self.name):
            raise InputError(
                f"a stage's name must be 1 to 40 letters, digits, _ or -, got {shown(self.name)}"
            )
        if self.gradient_accumulation_steps > self.batch_size:
            raise InputError(
                f"the stage {self.name!r} must have gradient_accumulation_steps from 1 to its batch_size"
                f" {self.batch_size}, got {self.gradient_accumulation_steps}"
            )


class Player(NamedTuple):
    """Weights with an optimizer of their own."""

    settings: OptimizerSettings
    parameters: dict[str, nn.Parameter]
    ema_decay: float | None
    """None for weights without an average, which stay as their last step left them."""


class Stage(Placed, ABC):
    """What is trained, and how well it does: all that the loop knows of a stage, over a model's parts.

    Made as ``STAGES[settings.kind].stage(parts, settings)``.
    """

    share = 1.0
    """Of a budget in minutes, relative to the other stages'."""

    def __init__(self, settings: StageSettings) -> None:
        super().__init__()
        self.settings = settings

    @abstractmethod
    def prepare(self, workspace: Workspace) -> Iterator[TrainStep]:
        """Fetches what the batches are made from."""

    @abstractmethod
    def batch(self, draw: Draw) -> Batch:
        """The tensors of a step, on the device: a pure function of `draw`."""

    @abstractmethod
    def example(self, count: int) -> Batch:
        """Tensors like those of `count` samples, to measure a step's time with before there is data."""

    forward: Callable[..., dict[str, Tensor]]
    """The weighted terms of a batch's loss, each a mean over the samples; their sum is minimised."""

    def players(self) -> dict[str, Player]:
        """Who is trained: one player, unless a stage says otherwise, of all parameters that require gradients."""
        trained = {name: p for name, p in self.named_parameters() if p.requires_grad}
        return {self.settings.kind: Player(self.settings, trained, self.settings.ema_decay)}

    def finish(self, done: bool) -> None:
        """Leaves the parts fit for use, at the end and where training was stopped on the way (`done` False)."""

    def placed(self, *tensors: Tensor) -> Batch:
        """On the device, in the memory format that convolutions like."""
        return tuple(x.to(self.device, memory_format=torch.channels_last) for x in tensors)
