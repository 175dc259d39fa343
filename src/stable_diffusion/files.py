"""Files that are whole or not there: written beside their name, then put in place.

What the system refuses with a file, or for want of memory, is one sentence here: an InputError.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import json
import os
import platform
import re
import shutil
import stat
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stable_diffusion.errors import InputError, shown

NESTING = 32
"""Of lists and objects in JSON: what says a value in an error, or walks it, can then not run out of stack."""

_PART = re.compile(r"\.(\w*)-(\d{1,9})-(\w+)-\w+\.part")
"""How the name of a hidden folder ends: the computer, the process and its mark, random letters."""
_LONGEST = 255  # bytes of a name on every system's disks
_DAY = 86400  # seconds after which another computer's process is taken for dead


def slug(text: str, default: str = "unnamed") -> str:
    """A text as one part of a path that every system takes, at most 60 letters and 180 bytes.

    Text from a file or a prompt is never a path: it may hold slashes, dots, and more bytes than a name can have.
    """
    name = re.sub(r"[^\w.]+", "-", text)[:60].encode("utf-8", "ignore")[:180].decode("utf-8", "ignore")
    name = name.strip("-.")
    reserved = re.fullmatch(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", name, re.IGNORECASE)  # on Windows
    return f"_{name}" if reserved else name or default


def lacks_memory(error: BaseException) -> bool:
    """Whether an error says that there is too little memory: Python's, the system's, or PyTorch's for any device."""
    said = isinstance(error, (OSError, RuntimeError)) and re.search(
        r"(allocate|enough|out of) memory", str(error)
    )
    return isinstance(error, MemoryError) or bool(said)


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Makes what the system refuses while something is read an InputError, which names the file."""
    with _refusals("open", path, "check the path"):
        yield


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """The same while something is written."""
    with _refusals("write", path, "choose another place"):
        yield


@contextmanager
def _refusals(verb: str, path: str | Path, advice: str) -> Iterator[None]:
    try:
        yield
    except (OSError, MemoryError, RuntimeError) as error:
        if _PART.search(str(path)):  # in a folder that is being written: the error names that folder
            raise
        if lacks_memory(error):
            raise InputError(
                f"cannot {verb} {path}: there is too little memory; close other programs"
            ) from error
        if not isinstance(error, OSError):
            raise
        other = error.filename not in (None, str(path)) and not _PART.search(str(error.filename))
        place = f" ({error.filename})" if other else ""
        raise InputError(f"cannot {verb} {path}: {error.strerror or error}{place}; {advice}") from error


@contextmanager
def replacing(path: Path, *, new: bool = False) -> Iterator[Path]:
    """A file beside `path` to be written, which takes its place unless an error is raised. Makes the folder.

    Args:
        path: the file.
        new: whether one that is there then is an error.

    Raises:
        InputError: what the system refuses.
    """
    with writing(path), _workshop(path, path.parent) as workshop:
        building = workshop / "new"
        building.touch()
        mode = building.stat().st_mode  # what the umask says; safetensors would leave others nothing
        yield building
        building.chmod(mode)
        if new:
            _put(building, path)
        else:
            building.replace(path)


def create(path: Path, write: Callable[[Path], object]) -> Path:
    """Writes a new file, and returns its name: `path`, or the first of ``name-2``, ``name-3`` … that nothing has.

    Two processes never get the same one. Raises InputError for what the system refuses.
    """
    with writing(path), _workshop(path, path.parent) as workshop:
        building = workshop / "new"
        write(building)
        free = path
        for number in itertools.count(2):
            with contextlib.suppress(FileExistsError):
                _put(building, free)
                break
            stem, end = path.stem, f"-{number}{path.suffix}"
            while len(stem) > 1 and len(os.fsencode(stem + end)) > _LONGEST:
                stem = stem[:-1]
            free = path.with_name(stem + end)
    return free


def _put(building: Path, path: Path) -> None:
    """Gives a file the name `path`. Raises FileExistsError where something has it."""
    try:
        os.link(building, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        path.touch(exist_ok=False)
        building.replace(path)


@contextmanager
def replacing_folder(folder: Path, ours: Callable[[str], object] = lambda name: False) -> Iterator[Path]:
    """A new folder beside `folder` to be filled, which takes its place unless an error is raised.

    Of one that is there, what is not ours stays. It comes back where putting the new one in place fails; where the
    process is killed between, ``tidy`` puts the new one there.

    Args:
        folder: the folder; a link to one stays a link.
        ours: whether a file of the older folder, such as ``unet/config.json``, may go.

    Raises:
        InputError: what the system refuses, or a new file has the name of one that is not ours.
    """
    named, folder = folder, _target(folder)
    with writing(named), _workshop(folder, folder.parent) as workshop:
        building, aside = workshop / "new", workshop / "old"
        building.mkdir()
        yield building
        if not folder.exists():
            building.replace(folder)
        elif not any(folder.iterdir()):  # perhaps the one that the user is in
            for path in building.iterdir():
                shutil.move(path, folder / path.name)  # which may be on another disk, mounted there
        else:
            _keep(folder, building, ours)
            folder.replace(aside)
            try:
                building.replace(folder)
            except BaseException:
                aside.replace(folder)
                raise


def _target(folder: Path) -> Path:
    """Where a folder is, or what a link to one leads to. Raises InputError for a link that leads to itself."""
    with writing(folder):
        try:
            return folder.resolve()
        except RuntimeError:  # so Python says it before 3.13
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(folder)) from None


def _keep(old: Path, new: Path, ours: Callable[[str], object]) -> None:
    """Gives the new folder what the old one has and is not ours."""
    for path in old.rglob("*"):
        name, is_folder = path.relative_to(old).as_posix(), path.is_dir() and not path.is_symlink()
        if ours(name) or (is_folder and any(path.iterdir())):
            continue
        (new / name).parent.mkdir(parents=True, exist_ok=True)
        if is_folder:
            (new / name).mkdir(exist_ok=True)
        elif os.path.lexists(new / name):
            raise FileExistsError(errno.EEXIST, "there is another file", str(path))
        else:
            try:
                os.link(path, new / name, follow_symlinks=False)
            except (OSError, NotImplementedError):  # a file system without links
                shutil.copy2(path, new / name, follow_symlinks=False)


def check_place(path: Path, *, is_folder: bool = False, size: int = 0) -> None:
    """Tries whether a file or a folder can be written at `path`, and leaves nothing: for before a long work.

    Args:
        path: what will be written.
        is_folder: whether that is a folder.
        size: bytes that it will take.

    Raises:
        InputError: it cannot be.
    """
    named, path = path, _target(path) if is_folder else path
    with writing(named):
        if not is_folder and path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if path.is_mount() and any(path.iterdir()):  # where another disk is, no folder can be put in place
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))
        for part in filter(Path.is_dir, (path, *path.rglob("*"))):
            if not os.access(part, os.R_OK | os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(part))
        there = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
        if (free := shutil.disk_usage(there).free) < size:
            raise InputError(
                f"{there} has {free / 1e6:,.0f} MB free and {path.name} needs {size / 1e6:,.0f} MB there:"
                " make room, or choose another place"
            )
        with _workshop(path, there) as workshop:
            trial = workshop / path.absolute().relative_to(there)
            trial.parent.mkdir(parents=True, exist_ok=True)
            trial.write_bytes(b"\0")


@contextmanager
def _workshop(path: Path, folder: Path) -> Iterator[Path]:
    """A hidden folder in `folder`, for what is to become `path`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)) from None
    tidy(path)
    start = f"{_hidden(path)}.{_computer()}-{os.getpid()}-{_process()}-"
    with tempfile.TemporaryDirectory(
        prefix=start, suffix=".part", dir=folder, ignore_cleanup_errors=True
    ) as made:
        yield Path(made)


def tidy(path: Path) -> None:
    """Removes what killed processes left of writing `path`; one that had moved the older folder away is finished."""
    start = _hidden(path)
    with contextlib.suppress(OSError):  # another process may do the same
        for workshop in path.parent.iterdir():
            match = _PART.fullmatch(workshop.name, len(start)) if workshop.name.startswith(start) else None
            if match and _is_abandoned(workshop, match[1], int(match[2]), match[3]):
                if (workshop / "old").is_dir() and not path.exists():
                    (workshop / "new").replace(path)
                shutil.rmtree(workshop, ignore_errors=True)


def _is_abandoned(workshop: Path, computer: str, pid: int, process: str) -> bool:
    if computer != _computer() or os.name != "posix":  # whose processes cannot be asked
        return time.time() - workshop.stat().st_mtime > _DAY
    if pid == os.getpid():
        return process != _process()
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:  # another user's
        pass
    return False


def _hidden(path: Path) -> str:
    """How the names of the hidden folders of `path` begin."""
    return "." + path.name.encode("utf-8", "ignore")[:100].decode("utf-8", "ignore")


def _computer() -> str:
    return re.sub(r"\W", "", platform.node())[:30]


@functools.cache
def _process() -> str:
    """A mark of this process, since the next one in a container may have the same number."""
    return uuid.uuid4().hex[:8]


def exists(path: Path) -> bool:
    """Whether something is there. Raises InputError where the system does not let us look, which is not a no."""
    return _mode(path) != 0


def is_file(path: Path) -> bool:
    """Whether there is a file. Raises InputError as ``exists`` does."""
    return stat.S_ISREG(_mode(path))


def _mode(path: Path) -> int:
    with reading(path):
        try:
            return path.stat().st_mode
        except ValueError:  # a zero byte
            return 0
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                raise
            return 0


def read_bytes(path: Path) -> bytes:
    """A file's content. Raises InputError as ``check_is_file`` does, and where the system refuses it."""
    check_is_file(path)
    with reading(path):
        return path.read_bytes()


def check_is_file(path: Path) -> None:
    """Raises InputError where nothing is, and for folders, pipes and devices, whose reading may never end."""
    if not is_file(path):
        problem = "is not a file" if exists(path) else "does not exist"
        raise InputError(f"{path} {problem}: check the path")


def as_path(path: object) -> Path:
    """The path that a caller gave. Raises InputError where it is none."""
    try:
        if isinstance(path, (str, os.PathLike)) and b"\0" not in os.fsencode(path):
            return Path(path)
    except (UnicodeError, TypeError):  # letters that no name can have, or a path of bytes
        pass
    raise InputError(f"a path must be a text or a Path, got {shown(path)}")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises InputError where there is none, or something else."""
    return json_object(path, read_bytes(path))


def json_object(
    place: object, text: str | bytes, advice: str = "copy or download it again"
) -> dict[str, Any]:
    """The JSON object that a text is, in UTF-8, UTF-16 or UTF-32. Raises InputError, which names `place`, otherwise."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place} is not JSON ({error}): {advice}") from None
    if _nested(content, NESTING):
        raise InputError(f"{place} nests lists and objects more than {NESTING} deep: it holds no settings")
    if not isinstance(content, dict):
        raise InputError(f"{place} must hold a JSON object, got a {type(content).__name__}")
    return content


def _nested(value: object, most: int) -> bool:
    """Whether lists and objects lie in each other more than `most` deep."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return (most == 0 and bool(inner)) or any(_nested(item, most - 1) for item in inner)


def write_json(path: Path, value: object) -> None:
    """Writes a JSON file, and the folder that it is in."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    # File names can hold bytes that are not text (lone surrogates). UTF-8 has no form for them; these escapes are JSON.
    with replacing(path) as building:
        building.write_text(text + "\n", encoding="utf-8", errors="backslashreplace", newline="\n")
