"""PyTorch's pickles (``.ckpt``, ``.pt``, ``.bin``), of which nothing is run but what rebuilds tensors."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stable_diffusion.errors import InputError

ZIP, PICKLE = STARTS = (b"PK\x03\x04", b"\x80")
"""How files of PyTorch begin: a zip archive, or a pickle by itself."""
DAMAGED = "is truncated, damaged or not a file of weights: copy or download it again"


class _Inert:
    """Stands for a foreign object that no weights need: takes whatever builds it and keeps nothing."""

    def __new__(cls, *_: object) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def _stand_in(name: str) -> type[_Inert]:
    module, _, cls = name.rpartition(".")
    return type(cls, (_Inert,), {"__module__": module, "__qualname__": cls})


class _ParameterDict(dict[str, Any]):
    """Stands for PyTorch's ``ParameterDict``, a module, which textual inversions hold: its parameters alone."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.update(state.get("_parameters", {}))


_ParameterDict.__module__ = "torch.nn.modules.container"
_ParameterDict.__qualname__ = "ParameterDict"

STAND_INS: list[Any] = [
    _ParameterDict,
    # Real checkpoints hold these: Lightning before 1.5 keys a dictionary by the class of its callback,
    # and what it monitors is a scalar of numpy. `_codecs.encode` and `set` PyTorch allows by itself.
    _stand_in("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"),
    _stand_in("numpy.core.multiarray.scalar"),
    _stand_in("numpy.core.multiarray._reconstruct"),
    _stand_in("numpy._core.multiarray.scalar"),
    _stand_in("numpy._core.multiarray._reconstruct"),
    _stand_in("numpy.dtype"),
    _stand_in("numpy.ndarray"),
]


def read(path: Path) -> dict[str, Any]:
    """What a pickle of PyTorch holds, with stand-ins for the foreign objects; a bare tensor gets the name "".

    Raises:
        InputError: the file is missing, empty, truncated, not a pickle of PyTorch or a zip bomb, holds no
            dictionary, or asks to run anything else, which is named and not run.
    """
    if not path.is_file():
        raise InputError(f"{path} is not a file: give a .ckpt, .pt or .bin file")
    with path.open("rb") as file:
        start = file.read(4)
    if not start:
        raise InputError(f"{path} is empty: copy or download it again")
    zipped = start == ZIP
    if zipped:
        _check_archive(path)
    elif not start.startswith(STARTS):
        raise InputError(f"{path} is not a file of PyTorch (it begins with {start!r}): give one of weights")
    try:
        with torch.serialization.safe_globals(STAND_INS):
            root = torch.load(str(path), map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # a damaged pickle makes the unpickler raise almost anything
        if asked := re.search(r"GLOBAL (\S+)", str(error)):
            raise InputError(f"{path} asks to run `{asked[1]}`, which no weights need: refused") from None
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            raise InputError(f"{path} asks for more memory than there is: is it damaged?") from None
        raise InputError(f"{path} {DAMAGED}") from None
    _check_tensors(path, root)
    if isinstance(root, Tensor):
        return {"": root}
    if not isinstance(root, dict):
        raise InputError(f"{path} holds a {type(root).__name__}, where files of weights hold a dictionary")
    return root


def _check_archive(path: Path) -> None:
    """Refuses archives that PyTorch does not write, of which it stores all members as they are."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        raise InputError(f"{path} {DAMAGED}") from None
    declared, size = sum(member.file_size for member in members), path.stat().st_size
    if declared > size or any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise InputError(
            f"{path} declares {declared:,} bytes of content in a file of {size:,}, but PyTorch does not compress:"
            " refused as a zip bomb"
        )
    if not any(member.filename.endswith("/data.pkl") for member in members):
        raise InputError(f"{path} is a zip archive without weights: give a .ckpt, .pt or .bin file")


def _check_tensors(path: Path, root: object) -> None:
    """Refuses tensors that repeat their few numbers until they need more memory than the file has bytes."""
    size, seen, todo = path.stat().st_size, {id(root)}, [root]
    while todo:
        value = todo.pop()
        if isinstance(value, Tensor) and value.numel() * value.element_size() > size:
            raise InputError(f"{path} declares a tensor that is larger than the file: refused")
        inner = (
            value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
        )
        new = [item for item in inner if id(item) not in seen]  # a pickle may hold itself
        seen.update(map(id, new))
        todo += new
