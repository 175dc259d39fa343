"""What a person sees of training and generation: bars on a terminal or in a notebook, elsewhere a line now and then."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any

from tqdm.auto import tqdm

from stable_diffusion.diffusion.samplers import Step
from stable_diffusion.errors import printable
from stable_diffusion.generation.pipeline import Result, Steps
from stable_diffusion.runtime import first_process, stop_signals, watched
from stable_diffusion.training.events import Observer, TrainStep


def show(
    progress: Generator[object, None, None],
    callback: Callable[[TrainStep], bool | None] | None = None,
    observers: Sequence[Observer] = (),
) -> object:
    """Runs a training to its end and shows it.

    Args:
        progress: yields steps, which move the bar, and other events, which are printed.
        callback: called after each step; True stops.
        observers: called with every event; True stops.

    A signal that asks to stop takes effect after the step, and in all processes after the same one, when the
    training is closed and saved; a second signal takes effect at once.

    Returns:
        What `progress` yielded last, or None where it was stopped.
    """
    from stable_diffusion.training.compute import agreed

    last: object = None
    caught: list[int] = []

    def note(number: int, _: object) -> None:
        caught.append(number)
        give_back()
        if first_process() and sys.stderr is not None:
            with contextlib.suppress(OSError, RuntimeError):  # it may have come within another print
                print("\nstopping after this step; another signal stops at once", file=sys.stderr, flush=True)

    try:
        with stop_signals(note) as give_back, contextlib.closing(progress), _Bar() as bar:
            for last in progress:
                bar.show(last)
                stops = [observer(last) is True for observer in observers]
                if callback is not None and isinstance(last, TrainStep):
                    stops.append(callback(last) is True)
                # The signal, 0 where someone here asks to stop, or -1.
                stop = caught[0] if caught else any(stops) - 1
                if isinstance(last, TrainStep) and last.loss is not None:
                    stop = agreed(stop)
                if stop >= 0:
                    caught += [stop] * (stop > 0 and not caught)
                    return None
        return last
    finally:
        if caught:
            signal.raise_signal(caught[0])


def show_steps(steps: Steps, whole: int, callback: Callable[[Step], bool | None] | None = None) -> Result:
    """Runs a generation to its end and shows it to who watches.

    Args:
        steps: what ``DiffusionModel.stream`` gives.
        whole: steps of a whole walk, of which image-to-image takes the last ones.
        callback: called after each step; True stops.
    """
    stop: bool | None = None
    with contextlib.closing(steps), tqdm(total=whole, unit="step", disable=not watched(), leave=False) as bar:
        try:
            while True:
                step = steps.send(stop)
                bar.total = step.total
                bar.set_description("steps" if step.total >= whole else f"{step.total} of {whole} steps")
                bar.update(step.index + 1 - bar.n)
                stop = None if callback is None else callback(step)
        except StopIteration as end:
            result: Result = end.value
    return result


def _say(text: object) -> None:
    """Prints lines. Training does not end because nobody can read them."""
    with contextlib.suppress(OSError):
        print(printable(text, kept="\n"), flush=True)


class _Bar:
    """Shows training on a terminal or in a notebook, a bar for each stage; elsewhere a line every minute."""

    def __init__(self) -> None:
        self.stage: str | None = None
        self.bar: Any = None
        self.spoke = time.monotonic()

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def show(self, event: object) -> None:
        if not isinstance(event, TrainStep):
            if first_process():
                with tqdm.external_write_mode():
                    _say(event)
            return
        if event.stage != self.stage:
            self.__exit__()
            self.stage = event.stage
            self.bar = tqdm(
                desc=printable(event.stage),
                total=event.total,
                initial=event.index,
                unit="step",
                disable=not watched(),
            )
        self.bar.total = event.total  # a plan may change
        self.bar.update(event.index + 1 - self.bar.n)
        if event.loss is not None:
            self.bar.set_postfix_str(str(event), refresh=False)
        if self.bar.disable and first_process() and time.monotonic() - self.spoke > 60:
            self.spoke = time.monotonic()
            _say(f"{event.stage} {event.index + 1}/{event.total} {event}")
