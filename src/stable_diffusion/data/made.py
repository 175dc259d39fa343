"""Sets that are made here, not downloaded: whole or not there, and made again only where something changed."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

from stable_diffusion.data.item import Progress
from stable_diffusion.errors import InputError
from stable_diffusion.files import read_json, replacing_folder

Captioned = list[tuple[dict[str, Any], list[str]]]
"""What a set says of each picture, its ``id`` among that, and its captions."""


def make_set(
    folder: Path, kind: str, info: dict[str, Any], record: str, fill: Callable[[Path], Iterator[Progress]]
) -> Generator[Progress, None, None]:
    """Makes a set, unless it is there already and was made of the same; one that was made of others is replaced.

    Args:
        folder: one that is empty, new, or such a set.
        kind: what the set is of; its ``description`` begins with ``mini-stable-diffusion`` and this word.
        info: all that the set depends on, as `record` has it under the key ``info``.
        record: one of the set's JSON files.
        fill: writes the set into an empty folder, as its steps are consumed.

    Raises:
        InputError: the folder is a file, holds something else, or cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{str(folder)!r} is a file: give a folder")
    if folder.is_dir() and any(folder.iterdir()):
        try:
            there = dict(read_json(folder / record)["info"])
        except (InputError, KeyError, TypeError, ValueError):
            there = {}
        if not str(there.get("description")).startswith(f"mini-stable-diffusion {kind}"):
            raise InputError(f"{str(folder)!r} holds something else than a set of {kind}: give a new folder")
        if there == info:
            return
    try:
        with replacing_folder(folder) as building:
            yield from fill(building)
    except OSError as error:
        raise InputError(
            f"cannot write {str(error.filename or folder)!r}: {error.strerror or error}; choose another place"
        ) from error


def write_captions(root: Path, split: str, info: dict[str, Any], pictures: Captioned, **more: Any) -> None:
    """Writes a split's file in COCO's format."""
    annotations = [
        {"id": image["id"] * 10 + nth, "image_id": image["id"], "caption": caption}
        for image, captions in pictures
        for nth, caption in enumerate(captions)
    ]
    data = {"info": info, **more, "images": [image for image, _ in pictures], "annotations": annotations}
    file = root / "annotations" / f"captions_{split}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(data), encoding="utf-8")
