"""``minisd info``: what a file is."""

from __future__ import annotations

from pathlib import Path

import tyro


def info(path: tyro.conf.Positional[str | None] = None) -> None:
    """Say what a model, a file of weights or a picture is; without a path, what the package's own model is.

    Args:
        path: A model folder, a single file, a LoRA, a hub name (owner/name), or a picture made here.
    """
    from stable_diffusion.checkpoints.checkpoint import packaged
    from stable_diffusion.checkpoints.files import is_weights
    from stable_diffusion.checkpoints.info import describe
    from stable_diffusion.generation.metadata import read_settings

    if path is not None and Path(path).is_file() and not is_weights(Path(path)):
        for key, value in read_settings(path).items():
            print(f"{key}: {value}")
        return
    for line in describe(packaged("model") if path is None else path):
        print(line)
