"""How many steps a stage gets: a number, or what fits into the time, measured again as it runs."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from accelerate.utils import broadcast_object_list

from stable_diffusion.training.events import Replan
from stable_diffusion.training.stage import COOLDOWN, StageSettings

OFF = 0.1  # part of the steps by which a plan must be wrong to be changed
OFTEN = 4  # steps from one look at the clock to the next

Clock = Callable[[], float]


@dataclass
class Pace:
    """The number of a stage's steps, which changes with the machine until the learning rate falls in any case."""

    settings: StageSettings
    total: int
    """Steps planned."""
    left: Callable[[], float] | None = None
    """Gives the seconds left for the stage; None where steps, not minutes, were asked for."""
    clock: Clock = time.monotonic
    """Gives seconds."""
    seconds: float | None = None
    """What a step takes, where it was measured for another plan to begin with."""
    last: float | None = field(default=None, init=False)
    times: deque[float] = field(default_factory=lambda: deque(maxlen=1000), init=False)

    def begin(self, step: int) -> Replan | None:
        """Says it if the plan is another one from the first step on, which is `step`."""
        return None if self.seconds is None else self.plan(step, self.seconds)

    def tick(self, step: int) -> Replan | None:
        """Takes note of the time, `step` steps being done, and says it if the plan changes.

        The median of the last quarter of the steps is what counts: pauses are no slow machine.
        """
        now = self.clock()
        if self.last is not None:
            self.times.append(now - self.last)
        self.last = now
        due = step == self.total or (step % OFTEN == 0 and len(self.times) >= OFTEN)
        if self.left is None or not due or not self.times:
            return None
        seconds = statistics.median(list(self.times)[-max(OFTEN, len(self.times) // 4) :])
        return self.plan(step, seconds)

    def plan(self, step: int, seconds: float) -> Replan | None:
        """Plans anew for steps of that many seconds, and says it if that is another plan."""
        assert self.left is not None
        total = step + max(1, int(self.left() / max(seconds, 1e-9)))
        total = broadcast_object_list([total])[0]  # the first process's clock counts
        falls = all(step > (1 - COOLDOWN) * planned for planned in (total, self.total))
        if abs(total - self.total) <= OFF * self.total or (falls and self.settings.schedule == "cooldown"):
            return None
        change = Replan(self.settings.name, total, self.total, seconds)
        self.total = total
        return change
