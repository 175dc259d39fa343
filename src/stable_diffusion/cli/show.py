"""What a person sees while a command works."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO, TypeVar

from stable_diffusion.errors import printable

if TYPE_CHECKING:
    from stable_diffusion.data.item import Progress

T = TypeVar("T")

OUTPUT = "standard output"


def tell(text: object) -> None:
    """Says something on standard error. Work does not end because nobody can read it."""
    try:
        print(printable(text, kept="\n"), file=sys.stderr, flush=True)
    except OSError:
        _discard(sys.stderr)


def say(*lines: object) -> None:
    """Prints lines of a result."""
    with printing():
        for line in lines:
            print(line)


@contextmanager
def printing() -> Iterator[None]:
    """What is printed within it goes out.

    Raises:
        OSError: it cannot; ``filename`` is ``OUTPUT`` then, and what follows goes nowhere.
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except OSError as error:
        _discard(sys.stdout)
        error.filename = OUTPUT
        raise


def _discard(stream: TextIO) -> None:
    """Sends what waits in a stream that cannot be written, and all that follows, nowhere: it cannot fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def finished(steps: Generator[Progress, None, T]) -> T:
    """What the steps return at their end; meanwhile, a bar for each of the things they do, or a line elsewhere."""
    from tqdm import tqdm

    from stable_diffusion.runtime import first_process

    what, bar = "", tqdm(disable=True)
    try:
        while True:
            step = next(steps)
            if step.what != what:
                bar.close()
                what, bar = step.what, tqdm(desc=printable(step.what), total=step.total, disable=None)
                if bar.disable and first_process():
                    tell(f"minisd: {what}")
            bar.update(step.done - bar.n)
    except StopIteration as end:
        return end.value
    finally:
        bar.close()
