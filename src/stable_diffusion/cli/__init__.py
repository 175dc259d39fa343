"""The command ``minisd``: one file a command. torch is imported when a command needs it."""

from __future__ import annotations

import codecs
import io
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from stable_diffusion.cli import data, evaluate, export, generate, info, mcp, serve, train
from stable_diffusion.cli.parse import parsed
from stable_diffusion.cli.show import OUTPUT, printing, say, tell
from stable_diffusion.errors import InputError, printable
from stable_diffusion.files import lacks_memory
from stable_diffusion.runtime import first_process, stop_signals, version

COMMANDS: dict[str, Callable[..., Any]] = {
    "generate": generate.generate,
    "serve": serve.serve,
    "mcp": mcp.mcp,
    "train": train.train,
    "data": data.data,
    "evaluate": evaluate.evaluate,
    "info": info.info,
    "export": export.export,
}


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    tell(f"minisd: note: {generate.in_options(str(message))}")


def _prepare_streams() -> None:
    """Gives standard streams where there is none, and makes every text go through them.

    Undecodable bytes of a path go out as they came in; for characters that the encoding lacks there are escapes.
    """

    def escaped(error: UnicodeError) -> tuple[str | bytes, int]:
        try:
            return codecs.lookup_error("surrogateescape")(error)
        except UnicodeError:
            return codecs.backslashreplace_errors(error)

    codecs.register_error("minisd", escaped)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed: until all three are open, files get their numbers
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115
        elif mode == "w" and isinstance(stream := getattr(sys, name), io.TextIOWrapper):
            stream.reconfigure(errors="minisd")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command. Input that cannot be used is one sentence on stderr and exit code 2."""
    _prepare_streams()
    warnings.showwarning = _show_warning
    warnings.filterwarnings("ignore", "Image size")  # PIL's, of pictures that are refused
    arguments = sys.argv[1:] if arguments is None else [*arguments]
    try:
        if arguments[:1] == ["--version"]:
            return say(f"minisd {version()}")
        _caught.clear()
        with stop_signals(_stop), _no_alarm_after():
            with printing():
                try:
                    command = parsed(COMMANDS, arguments)
                except SystemExit:
                    if arguments[:1] == ["generate"]:
                        print(*generate.examples(), sep="\n")  # which tyro has no place for in its help
                    raise
            try:
                command()
            except Exception:
                if _caught:  # what was raised for it, code in C has made an error of its own
                    raise KeyboardInterrupt(_caught[0]) from None
                raise
        say()
    except InputError as error:
        tell(f"minisd: {printable(generate.in_options(error.command))}")
        raise SystemExit(2) from None
    except OSError as error:  # a place that cannot be read or written, a full disk
        if error.errno is None:
            raise
        if isinstance(error, BrokenPipeError) and error.filename == OUTPUT:
            raise SystemExit(0) from None  # who read this, such as head, has seen enough
        place = f" {error.filename}" if error.filename else ""
        tell(f"minisd: cannot read or write{place}: {error.strerror}")
        raise SystemExit(2) from None
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        tell("minisd: there is too little memory: close other programs, or ask for less at once")
        raise SystemExit(2) from None
    except KeyboardInterrupt as stop:
        if first_process():
            tell(f"minisd: stopped{_how_to_continue(arguments)}")
        raise SystemExit(128 + (stop.args or [signal.SIGINT])[0]) from None


_caught: list[int] = []
"""The signals for which the command was interrupted."""


def _stop(number: int, frame: FrameType | None, waits: int = 100) -> None:
    """Whatever the signal, what was begun is tidied up as after Ctrl-C.

    An import is waited for, up to five seconds: modules such as torch may swallow what is raised in theirs.
    """
    if waits and hasattr(signal, "setitimer") and _in_import(frame):
        signal.signal(signal.SIGALRM, lambda _, frame: _stop(number, frame, waits - 1))
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        return
    _caught.append(number)
    raise KeyboardInterrupt(number)


@contextmanager
def _no_alarm_after() -> Iterator[None]:
    """A stop that still waits for an import ends with the command."""
    try:
        yield
    finally:
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)


def _in_import(frame: FrameType | None) -> bool:
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None


def _how_to_continue(arguments: Sequence[str]) -> str:
    if arguments[:1] not in (["train"], ["evaluate"]) or "--check" in arguments:
        return ""
    fresh = " without --fresh" if "--fresh" in arguments else ""
    return f"; run the same command{fresh} again to continue"
