"""Sets that are made here, not downloaded: whole or not there, and made again only where something changed."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

from stable_diffusion.data.item import Progress
from stable_diffusion.errors import InputError
from stable_diffusion.files import check_place, read_json, replacing_folder, writing

Captioned = list[tuple[dict[str, Any], list[str]]]
"""What a set says of each picture, its ``id`` among that, and its captions."""


def make_set(
    folder: Path,
    kind: str,
    info: dict[str, Any],
    records: tuple[str, ...],
    fill: Callable[[Path], Iterator[Progress]],
) -> Generator[Progress, None, None]:
    """Makes a set, unless it is there already and was made of the same; one that was made of others is replaced.

    Of that one its own files go; what else is in its folder stays.

    Args:
        folder: one that is empty, new, or such a set.
        kind: what the set is of; its ``description`` begins with ``mini-stable-diffusion`` and this word.
        info: all that the set depends on, as the first of `records` has it under the key ``info``.
        records: the set's files beside pictures and captions, first a JSON file that says what it was made of.
        fill: writes the set into an empty folder, as its steps are consumed.

    Raises:
        InputError: the folder is a file, holds something else, or cannot be written.
    """
    there: dict[str, Any] = {}
    with writing(folder):
        taken = folder.exists() and any(folder.iterdir())
    if taken:
        there = _info(_content(folder / records[0]))
        if not str(there.get("description")).startswith(f"mini-stable-diffusion {kind}"):
            raise InputError(f"{str(folder)!r} holds something else than a set of {kind}: give a new folder")
        if there == info:
            return
    own = {*records, *_files(folder, there)}
    check_place(folder, is_folder=True)
    with replacing_folder(folder, own.__contains__) as building:
        yield from fill(building)


def _content(record: Path) -> dict[str, Any]:
    """The JSON object in a file; nothing where it is something else."""
    try:
        return read_json(record)
    except InputError as error:
        if isinstance(error.__cause__, PermissionError):
            raise
        return {}


def _info(content: dict[str, Any]) -> dict[str, Any]:
    """What a file of a set says that it was made of."""
    info = content.get("info")
    return info if isinstance(info, dict) else {}


def _files(folder: Path, info: dict[str, Any]) -> Iterator[str]:
    """The captions and the pictures of the set that was made of this."""
    for path in folder.glob("annotations/captions_*.json"):
        content = _content(path)
        if info.items() <= _info(content).items():
            images = content.get("images")
            listed = images if isinstance(images, list) else []
            names = [image.get("file_name") for image in listed if isinstance(image, dict)]
            yield path.relative_to(folder).as_posix()
            yield from (f"{path.stem.removeprefix('captions_')}/{name}" for name in names)


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
