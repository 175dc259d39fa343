"""One training at a time in a run's folder."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from stable_diffusion.errors import InputError
from stable_diffusion.files import writing

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keeps other trainings out of a folder. The processes of one training are one.

    Raises:
        InputError: one is in it.
    """
    with ExitStack() as stack:
        other = stack.enter_context(_locked(folder / ".lock")) if PartialState().is_main_process else None
        if (other := broadcast_object_list([other])[0]) is not None:
            said = f"{folder} is in use by another training (process {other}): wait until it ends, or choose another"
            raise InputError(f"{said} output_dir", f"{said} --output")
        yield


@contextmanager
def _locked(path: Path) -> Iterator[str | None]:
    """Holds the system's lock on a file, which is free as soon as its process is gone, however that ended.

    Yields None, or the number of the process that holds it. On a file system without locks it is never held.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="ascii")
    with file:
        try:
            if sys.platform == "win32":
                file.seek(2**30)  # beyond the number, which others may then read
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.seek(0)
                yield file.read().strip() or "unknown"
                return
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield None
