"""What training reads again and again, prepared once and kept on disk: decoded pictures, latents, text.

A cache's file name holds a digest of everything that went into it, so that a change makes a new one.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
import numpy.typing as npt

from stable_diffusion.files import check_place, reading, replacing, tidy

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
            InputError: the disk has no room for the array, or the system refuses it.
        """
        if self._is_whole():
            return
        check_place(self.path, size=math.prod(self.shape) * np.dtype(self.dtype).itemsize)
        with replacing(self.path) as building:
            self._remove_others()
            array = np.lib.format.open_memmap(building, mode="w+", dtype=self.dtype, shape=self.shape)
            if hasattr(os, "posix_fallocate"):  # writing to a mapped file on a full disk ends the process
                with building.open("r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, building.stat().st_size)
            done = 0
            for block in blocks:
                array[done : done + len(block)] = block
                done += len(block)
                yield done
            array.flush()
            del array  # Windows moves no file that is mapped

    def _remove_others(self) -> None:
        """Removes the caches of this name and other keys, and what killed processes left of them."""
        own = re.compile(rf"(\.?)({re.escape(self.name)}-[^-]+\.npy)(.*)")
        for match in filter(None, (own.fullmatch(path.name) for path in self.folder.iterdir())):
            if match[1]:
                tidy(self.folder / match[2])
            elif not match[3]:
                (self.folder / match[2]).unlink(missing_ok=True)

    def _is_whole(self) -> bool:
        try:
            rows = self.read()
        except (OSError, ValueError, EOFError, SyntaxError, TokenError):  # none, or what a crash left
            return False
        return rows.shape == self.shape and rows.dtype == self.dtype

    def read(self) -> Array:
        """The rows, mapped from disk."""
        with reading(self.path):
            return np.load(self.path, mmap_mode="r")
