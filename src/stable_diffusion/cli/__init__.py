"""The command ``minisd``: one file a command. torch is imported when a command needs it."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import tyro

from stable_diffusion.cli import data, evaluate, export, generate, info, train
from stable_diffusion.errors import InputError
from stable_diffusion.files import lacks_memory
from stable_diffusion.runtime import first_process, stop_signals

COMMANDS: dict[str, Callable[..., Any]] = {
    "generate": generate.generate,
    "train": train.train,
    "data": data.data,
    "evaluate": evaluate.evaluate,
    "info": info.info,
    "export": export.export,
}


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"minisd: note: {message}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command. Input that cannot be used is one sentence on stderr and exit code 2."""
    warnings.showwarning = _show_warning
    warnings.filterwarnings("ignore", "Image size")  # PIL's, of pictures that are refused
    arguments = sys.argv[1:] if arguments is None else [*arguments]
    try:
        with stop_signals(_stop):
            tyro.extras.subcommand_cli_from_dict(
                COMMANDS,
                prog="minisd",
                description="Pictures from words, on a machine of your own.",
                args=arguments,
            )
            sys.stdout.flush()
    except BrokenPipeError:  # who read this, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    except InputError as error:
        print(f"minisd: {error.command}", file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as error:  # a place that cannot be read or written, a full disk
        if error.errno is None:
            raise
        place = f" {error.filename}" if error.filename else ""
        print(f"minisd: cannot read or write{place}: {error.strerror}", file=sys.stderr)
        raise SystemExit(2) from None
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        print(
            "minisd: there is too little memory: close other programs, or ask for less at once",
            file=sys.stderr,
        )
        raise SystemExit(2) from None
    except SystemExit as end:
        if end.code == 0 and list(arguments[:1]) == ["generate"]:
            for line in generate.examples():  # which tyro has no place for
                print(line)
        raise
    except KeyboardInterrupt as stop:
        if first_process():
            print(f"minisd: stopped{_how_to_continue(arguments)}", file=sys.stderr)
        raise SystemExit(128 + (stop.args or [signal.SIGINT])[0]) from None


def _stop(number: int, _: object) -> None:
    """Whatever the signal, what was begun is tidied up as after Ctrl-C."""
    raise KeyboardInterrupt(number)


def _how_to_continue(arguments: Sequence[str]) -> str:
    if arguments[:1] not in (["train"], ["evaluate"]) or "--check" in arguments:
        return ""
    fresh = " without --fresh" if "--fresh" in arguments else ""
    return f"; run the same command{fresh} again to continue"
