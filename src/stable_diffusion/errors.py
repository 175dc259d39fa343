"""What a user is told when an input cannot be used."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches

_CONTROLS = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class InputError(ValueError):
    """An input that cannot be used: one sentence with the value, what is accepted, and what to do.

    The command line prints it without a traceback and exits with code 2.

    Attributes:
        command: the sentence in the words of the command line, where these are others.
    """

    def __init__(self, said: str, command: str | None = None) -> None:
        super().__init__(said)
        self.command = said if command is None else command


def printable(text: object, *, kept: str = "") -> str:
    """Text of files and of users as one line that a terminal shows and does not obey.

    Escapes stand for control characters, ends of lines, marks that turn the direction of writing, and for bytes of
    file names that are no text (lone surrogates); not for those that are `kept`.
    """

    def escaped(found: re.Match[str]) -> str:
        return found[0] if found[0] in kept else found[0].encode("unicode_escape").decode()

    return _CONTROLS.sub(escaped, str(text))


def three_of(names: Sequence[str]) -> str:
    """The first three names, and whether there are more."""
    return ", ".join(map(printable, names[:3])) + (", …" if len(names) > 3 else "")


def shown(value: object, most: int = 80) -> str:
    """A value as a sentence shows it: its first `most` characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits, or lists in lists without end
        text = f"a {type(value).__name__} that is too large to show"
    return shortened(text, most)


def shortened(text: str, most: int) -> str:
    """A text, or its first `most` characters and a mark that there are more."""
    return text if len(text) <= most else f"{text[:most]}…"


def unknown_name(kind: str, name: object, choices: Iterable[str]) -> InputError:
    """The error for a name that is not in a table: lists the choices and the closest one."""
    choices = sorted(choices)
    close = get_close_matches(name[:80], choices, n=1) if isinstance(name, str) else ()
    hint = f"did you mean {close[0]!r}? " if close else ""
    accepted = f"choose one of {', '.join(choices)}" if choices else "there are none here"
    return InputError(f"unknown {kind} {shown(name)}: {hint}{accepted}")
