"""The command ``minisd``: one file a command. torch is imported when a command needs it."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import tyro

from stable_diffusion.cli import data, evaluate, export, generate, info, train
from stable_diffusion.errors import InputError
from stable_diffusion.files import lacks_memory

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
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
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
        print(f"minisd: {error}", file=sys.stderr)
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
    except KeyboardInterrupt:
        print("minisd: stopped; run the same command again to continue", file=sys.stderr)
        raise SystemExit(130) from None
