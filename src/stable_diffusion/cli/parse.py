"""The words of a command line as a call of a command, or one sentence that says why not."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr
from difflib import get_close_matches
from functools import partial, wraps
from itertools import pairwise, takewhile
from typing import Any, ParamSpec, TypeVar

import tyro

from stable_diffusion.errors import InputError

P = ParamSpec("P")
T = TypeVar("T")


def deferred(command: Callable[P, T]) -> Callable[P, Callable[[], T]]:
    """The command with its arguments, to be called when all of them are known to be right."""

    @wraps(command)
    def chosen(*args: P.args, **kwargs: P.kwargs) -> Callable[[], T]:
        return partial(command, *args, **kwargs)

    return chosen


def parsed(commands: Mapping[str, Callable[..., Any]], words: Sequence[str]) -> Callable[[], Any]:
    """The call of one of the commands that the words are. Help is printed, and ends in SystemExit.

    Raises:
        InputError: no command has such words.
    """
    told = io.StringIO()
    try:
        with redirect_stderr(told):
            return tyro.extras.subcommand_cli_from_dict(
                {name: deferred(command) for name, command in commands.items()},
                prog="minisd",
                description="Pictures from words, on a machine of your own.",
                args=words,
            )
    except SystemExit as end:
        if not end.code:
            raise
    lines = [line.strip("│ ") for line in told.getvalue().splitlines()]
    title = 2 if "".join(lines[1:2]).startswith("---") else 1  # of a box in ASCII, or not
    command = next((word for word in words if word in commands), "")
    raise InputError(f"{_problem(lines[title:], command)}; see minisd {command} --help".replace("  ", " "))


def _problem(lines: list[str], command: str) -> str:
    """What tyro says in a box of lines, in short."""
    said = " ".join(takewhile(lambda line: line[:3] not in ("───", "---"), lines)).partition(" Got errors")[0]
    if wrong := re.match(
        r"Error parsing ([^/:]+)[^:]*: (.*(INT|int|FLOAT|float)\b.*) (?:could|:|with)", said
    ):
        count = len(re.findall("INT|FLOAT", wrong[2]))
        kind = "a whole number" if wrong[3].lower() == "int" else "a number"
        given = " ".join(re.findall("'(.*?)'", said))
        return f"{wrong[1]} must be {kind if count < 2 else f'{count} numbers'}, got {given!r}"
    if (unknown := re.match(r"Unrecognized.*?options: ([^\s,]+)", said)) is None:
        return said.replace(" (required)", "").replace(" Expected 1 values", "").rstrip(".")
    names: list[str] = []
    choices: list[str] = []
    known = ""
    for line, after in pairwise(
        [*lines, ""]
    ):  # names of options, what each is for, then the commands that have it
        if line.startswith("Available subcommands: "):
            said = line if not line.endswith(",") else f"{line} {after}"  # where the box is too narrow for it
            known = f", choose one of {said.partition(': ')[2]}"
            choices = re.findall(r"\w+", known)
        elif line.startswith("--"):
            names = re.findall(r"--[\w-]+", line)
        elif line.startswith(f"in minisd {command} "):
            choices += names
    close = get_close_matches(unknown[1], choices, n=1)
    return f"unknown word {unknown[1]!r}" + (f", did you mean {close[0]!r}?" if close else known)
