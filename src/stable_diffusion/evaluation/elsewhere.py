"""Pictures of the tasks' prompts that another program generated: a list of what is wanted, and a folder of them."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from pathlib import Path

import numpy as np

from stable_diffusion import images
from stable_diffusion.data.cache import Array
from stable_diffusion.data.item import Progress
from stable_diffusion.errors import InputError
from stable_diffusion.evaluation.benchmark import SEEDS
from stable_diffusion.evaluation.pictures import Group
from stable_diffusion.files import is_file, read_json, write_json

LIST = "prompts.json"


def check_prompts(folder: Path, tasks: Iterable[Group], count: int, seed: int) -> None:
    """Writes the list of prompts, unless it is there.

    Raises:
        InputError: it was not there, so that there are no pictures either; or it is of other prompts.
    """
    wanted = {
        "prompts": [
            {"file": _file(group, i, k), "prompt": group.caption(row, seed), "seed": seed + i * SEEDS + k}
            for group in tasks
            for i, row in enumerate(group.rows[:count])
            for k in range(SEEDS)
        ]
    }
    path = folder / LIST
    if not is_file(path):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, wanted)
        raise InputError(
            f"{path} now lists {len(wanted['prompts'])} pictures, each with its prompt and a seed: generate them into"
            f" {folder}, then run the same command again"
        )
    if read_json(path) != wanted:
        raise InputError(
            f"{path} is of another set, count, seed or choice of splits: give the same ones, or another folder"
        )


def pictures_of(folder: Path, group: Group, count: int, size: int) -> Generator[Progress, None, Array]:
    """``SEEDS`` pictures of each of the group's first prompts, cut and scaled to squares.

    Raises:
        InputError: one is missing, or not a picture.
    """
    made = []
    for i in range(count):
        for k in range(SEEDS):
            made.append(np.asarray(images.cover(images.open_image(folder / _file(group, i, k)), size, size)))
        yield Progress(f"{group.name}: reading", i + 1, count)
    return np.stack(made)


def _file(group: Group, prompt: int, number: int) -> str:
    return f"{group.name}/{prompt:04}-{number}.png"
