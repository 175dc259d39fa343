"""What a person sees while a command works."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from stable_diffusion.data.item import Progress

T = TypeVar("T")


def finished(steps: Generator[Progress, None, T]) -> T:
    """What the steps return at their end; meanwhile, on a terminal, a bar for each of the things they do."""
    from tqdm import tqdm

    what, bar = "", tqdm(disable=True)
    try:
        while True:
            step = next(steps)
            if step.what != what:
                bar.close()
                what, bar = step.what, tqdm(desc=step.what, total=step.total, disable=None)
            bar.update(step.done - bar.n)
    except StopIteration as end:
        return end.value
    finally:
        bar.close()
