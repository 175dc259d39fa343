"""Files that are whole or not there: written beside their name, then put in place."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stable_diffusion.errors import InputError, shown

NESTING = 32
"""Of lists and objects in JSON: what says a value in an error, or walks it, can then not run out of stack."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` to be written, which takes its place unless an error is raised. Makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    building = path.with_name(f".{path.name[:50]}.{uuid.uuid4().hex}.part")
    try:
        building.touch()
        mode = building.stat().st_mode  # what the umask says; safetensors would leave others nothing
        yield building
        building.chmod(mode)
        building.replace(path)
    finally:
        building.unlink(missing_ok=True)


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder` to be filled, which takes its place unless an error is raised.

    The one that is there comes back where putting the new one in place fails.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as workshop:
        building, aside = Path(workshop, "new"), Path(workshop, "old")
        building.mkdir()
        yield building
        if not folder.exists():
            building.replace(folder)
            return
        folder.replace(aside)
        try:
            building.replace(folder)
        except BaseException:
            aside.replace(folder)
            raise
        shutil.rmtree(aside)


def as_path(path: object) -> Path:
    """The path that a caller gave. Raises InputError where it is none."""
    if not isinstance(path, (str, os.PathLike)) or "\0" in str(path):
        raise InputError(f"a path must be a text or a Path, got {shown(path)}")
    return Path(path)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises InputError where there is none, or something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: check the path") from None
    except OSError as error:
        raise InputError(f"cannot open {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error}): copy or download it again") from None
    if _nested(content, NESTING):
        raise InputError(f"{path} nests lists and objects more than {NESTING} deep: it holds no settings")
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold a JSON object, got a {type(content).__name__}")
    return content


def _nested(value: object, most: int) -> bool:
    """Whether lists and objects lie in each other more than `most` deep."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return (most == 0 and bool(inner)) or any(_nested(item, most - 1) for item in inner)


def write_json(path: Path, value: object) -> None:
    """Writes a JSON file, and the folder that it is in."""
    with replacing(path) as building:
        text = json.dumps(value, indent=2, ensure_ascii=False)
        building.write_text(text + "\n", encoding="utf-8", newline="\n")
