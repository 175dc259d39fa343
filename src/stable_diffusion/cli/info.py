"""``minisd info``: what a file is."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import tyro

from stable_diffusion.cli.show import say
from stable_diffusion.errors import printable


def info(path: tyro.conf.Positional[str | None] = None) -> None:
    """Say what a model, a file of weights or a picture is; without a path, what the package's own model is.

    Args:
        path: A model folder, a single file, a LoRA, a hub name (owner/name), or a picture made here.
    """
    from stable_diffusion.checkpoints.checkpoint import packaged
    from stable_diffusion.checkpoints.files import is_weights
    from stable_diffusion.checkpoints.info import describe
    from stable_diffusion.generation.metadata import read_settings, read_sheet

    if path is not None and Path(path).is_file() and not is_weights(Path(path)):
        settings, sheet = read_settings(path), read_sheet(path)
        settings |= {} if sheet is None else {"sheet": sheet}
        lines: Iterable[str] = (f"{key}: {value}" for key, value in settings.items())
    else:
        lines = describe(packaged("model") if path is None else path)
    say(*map(printable, lines))
