"""What a training says as it goes: its plan, every step, and when the plan changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Plan:
    """What a run is going to do; ``str`` is the line that it begins with."""

    name: str
    pictures: int
    captions: int
    steps: dict[str, int]
    """Optimizer updates of each stage."""
    seconds: dict[str, float]
    """Measured time of one update of each stage."""
    device: str
    number_format: str
    compiled: Sequence[str] | None = None
    """Stages that are compiled before their first step; None where no compiler was given."""

    def __str__(self) -> str:
        stages = ", ".join(f"{stage} {count} steps" for stage, count in self.steps.items())
        minutes = sum(count * self.seconds[stage] for stage, count in self.steps.items()) / 60
        return (
            f"training {self.name} on {self.pictures} pictures with {self.captions} captions: {stages};"
            f" {'under a minute' if minutes < 1 else f'about {minutes:.0f} min'} of steps on {self.device} in"
            f" {self.number_format}, after reading the data{self._compiling()}"
        )

    def _compiling(self) -> str:
        if self.compiled is None:
            return ""
        if not self.compiled:
            return "; not compiled, which takes minutes and pays only in longer stages"
        return f" and minutes of compiling ({', '.join(self.compiled)})"


@dataclass(frozen=True)
class Replan:
    """Another number of steps for a stage, by what a step takes now; ``str`` is a line to show."""

    stage: str
    steps: int
    before: int
    seconds: float
    """What a step takes."""

    def __str__(self) -> str:
        return f"{self.stage}: {self.steps} steps instead of {self.before}, at {self.seconds:.3g} s a step"


@dataclass(frozen=True)
class TrainStep:
    """One step of a stage, or of the preparation before it."""

    stage: str
    index: int
    """Number of the optimizer update, or of the last row prepared, from 0."""
    total: int
    losses: Mapping[str, float] = field(default_factory=dict)
    """The weighted terms of the loss, over the whole batch; empty in preparation."""
    learning_rates: Mapping[str, float] = field(default_factory=dict)
    """Of each player."""
    images_per_second: float = 0.0
    skipped: int = 0
    """Steps so far whose gradient was not finite; they change nothing."""

    @property
    def loss(self) -> float | None:
        """The sum of the losses; None in preparation."""
        return sum(self.losses.values()) if self.losses else None

    @property
    def learning_rate(self) -> float:
        """The first player's."""
        return next(iter(self.learning_rates.values()), 0.0)

    def __str__(self) -> str:
        if self.loss is None:
            return ""
        skipped = f", {self.skipped} skipped" if self.skipped else ""
        return f"loss {self.loss:.4f}, {self.images_per_second:.0f} images/s{skipped}"


Event = Plan | Replan | TrainStep
Observer = Callable[[object], object]
"""Called with every event, and what else is yielded; stops the training by returning True."""
