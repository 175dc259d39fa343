"""What training reads again and again, prepared once and kept on disk: decoded pictures, latents, text.

A cache's file name holds a digest of everything that went into it, so that a change makes a new one.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stable_diffusion.errors import InputError
from stable_diffusion.files import replacing

Array = npt.NDArray[Any]


def digest(*parts: object) -> str:
    """A short digest of anything with a stable `repr`, and of the bytes of arrays."""
    hasher = hashlib.sha256()
    for part in parts:
        hasher.update(part.tobytes() if isinstance(part, np.ndarray) else repr(part).encode())
        hasher.update(b"\0")
    return hasher.hexdigest()[:16]


class ArrayCache:
    """Rows of one shape in a file that is mapped, not read.

    Args:
        folder: where caches are.
        name: what the rows are; caches of the same name with another key are removed.
        key: digest of what the rows depend on.
        shape: of the whole array, rows first.
        dtype: numpy's name of the number format.
    """

    def __init__(self, folder: Path, name: str, key: str, shape: tuple[int, ...], dtype: str) -> None:
        self.path = folder / f"{name}-{key}.npy"
        self.folder, self.name, self.shape, self.dtype = folder, name, shape, dtype

    def fill(self, blocks: Iterable[Array]) -> Iterator[int]:
        """Writes the rows, unless they are there; `blocks` are consecutive ones. Yields the number of rows done.

        Raises:
            InputError: the disk has no room for the array.
        """
        if self._is_whole():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        size = int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize
        free = shutil.disk_usage(self.folder).free
        if size > free:
            raise InputError(
                f"{self.folder} has {free / 1e9:.1f} GB free and training needs {size / 1e9:.1f} GB there for"
                f" {self.name}: make room, or choose another folder for it"
            )
        for pattern in (f"{self.name}-*.npy", f".{self.name}-*.part"):  # the second of a run that was killed
            for stale in self.folder.glob(pattern):
                stale.unlink()
        with replacing(self.path) as building:
            array = np.lib.format.open_memmap(building, mode="w+", dtype=self.dtype, shape=self.shape)
            done = 0
            for block in blocks:
                array[done : done + len(block)] = block
                done += len(block)
                yield done
            array.flush()
            del array  # Windows moves no file that is mapped

    def _is_whole(self) -> bool:
        try:
            rows = self.read()
        except (OSError, ValueError, EOFError):  # none, or one that a crash or a full disk left
            return False
        return rows.shape == self.shape and rows.dtype == self.dtype

    def read(self) -> Array:
        """The rows, mapped from disk."""
        return np.load(self.path, mmap_mode="r")
