"""PyTorch's pickles (``.ckpt``, ``.pt``, ``.bin``), read by a machine that knows the few steps weights are made of.

Nothing that a file names is imported or called. ``torch.load(weights_only=True)`` promises that too, but before
2.6 it could be made to run code (CVE-2025-32434), and it allows more than weights need: a file of a hundred bytes
can make it fill the memory, or crash.
"""

from __future__ import annotations

import io
import math
import mmap
import pickletools
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, UntypedStorage

from stable_diffusion.errors import InputError
from stable_diffusion.files import lacks_memory

ZIP, PICKLE = STARTS = (b"PK\x03\x04", b"\x80")
"""How files of PyTorch begin: a zip archive, or a pickle by itself."""
DAMAGED = "is truncated, damaged or not a file of weights: copy or download it again"

LONGEST = 64 * 2**20
"""Bytes of a pickle, without the tensors' numbers; Stable Diffusion's has 0.3 million."""
MOST_STEPS = 1_000_000
"""Instructions of a pickle; Stable Diffusion's has 50,000."""
MOST_AXES = 8

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
"""How files that are not zip archives begin (torch/serialization.py)."""

STORAGES = {
    **{"Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16},
    **{"Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8},
    **{"Byte": torch.uint8, "Bool": torch.bool},
}
DTYPES = {
    **{f"torch {name}Storage": dtype for name, dtype in STORAGES.items()},
    **{f"torch {name}": dtype for name, dtype in vars(torch).items() if isinstance(dtype, torch.dtype)},
    "torch.storage UntypedStorage": torch.uint8,
}

FOREIGN = {
    # Real checkpoints hold these: Lightning before 1.5 keys a dictionary by the class of its callback, and what
    # it monitors is a scalar of numpy.
    "pytorch_lightning.callbacks.model_checkpoint ModelCheckpoint",
    "numpy.core.multiarray scalar",
    "numpy.core.multiarray _reconstruct",
    "numpy._core.multiarray scalar",
    "numpy._core.multiarray _reconstruct",
    "numpy dtype",
    "numpy ndarray",
    "torch device",
}
"""Read as stand-ins without content: weights do not need them."""

VALUES = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING"}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


class _Foreign:
    """Stands for a foreign object, or for what makes one."""


class _Storage(NamedTuple):
    """A tensor's numbers."""

    content: UntypedStorage
    dtype: torch.dtype


Opener = Callable[[str, int], UntypedStorage]
"""Gives the storage of a name, of so many bytes."""


def read(path: Path) -> dict[str, Any]:
    """What a pickle of PyTorch holds, with stand-ins for the foreign objects; a bare tensor gets the name "".

    Raises:
        OSError: the system refuses the file.
        InputError: it is empty, truncated, not a pickle of PyTorch or a zip bomb, holds no dictionary, or asks to run
            anything else, which is named and not run.
    """
    with path.open("rb") as file:
        start = file.read(4)
        if not start:
            raise InputError(f"{path} is empty: copy or download it again")
        if not start.startswith(STARTS):
            raise InputError(
                f"{path} is not a file of PyTorch (it begins with {start!r}): give one of weights"
            )
        try:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                root = (_read_archive if start == ZIP else _read_legacy)(path, content)
        except InputError:
            raise
        except Exception as error:  # damaged archives and pickles make their parsers raise almost anything
            if lacks_memory(error):  # the caller says it
                raise
            raise InputError(f"{path} {DAMAGED}") from None
    if isinstance(root, Tensor):
        return {"": root}
    if not isinstance(root, dict):
        raise InputError(f"{path} holds a {type(root).__name__}, where files of weights hold a dictionary")
    return root


def _read_archive(path: Path, content: mmap.mmap) -> object:
    """What a zip archive holds: a pickle, and the storages as members, mapped into memory."""
    size = len(content)
    with zipfile.ZipFile(path) as archive:
        members = {member.filename: member for member in archive.infolist()}
    declared = sum(member.file_size for member in members.values())
    if declared > size or any(member.compress_type != zipfile.ZIP_STORED for member in members.values()):
        raise InputError(
            f"{path} declares {declared:,} bytes of content in a file of {size:,}, but PyTorch does not compress:"
            " refused as a zip bomb"
        )
    pickle = next((name for name in members if name.endswith("/data.pkl")), None)
    if pickle is None:
        raise InputError(f"{path} is a zip archive without weights: give a .ckpt, .pt or .bin file")
    folder, mapped = pickle.removesuffix("data.pkl"), UntypedStorage.from_file(str(path), False, size)

    def place(name: str) -> slice:
        member = members[name]
        start = member.header_offset + 30  # APPNOTE.TXT 4.3.7: then the name and the extra field
        start += sum(struct.unpack_from("<HH", content, start - 4))
        if start + member.file_size > size:
            raise ValueError
        return slice(start, start + member.file_size)

    def storage(name: str, length: int) -> UntypedStorage:
        found = mapped[place(f"{folder}data/{name}")]
        if len(found) < length:
            raise ValueError
        return found

    order = f"{folder}byteorder"
    if order in members and content[place(order)] == b"big":
        raise InputError(f"{path} is of a machine that writes numbers the other way round: save it anew here")
    where = place(pickle)
    return _Machine(path, size, content[where.start : min(where.stop, where.start + LONGEST)], storage).run()


def _read_legacy(path: Path, content: mmap.mmap) -> object:
    """What a file of before PyTorch 1.6 holds: pickles in a row, then the storages that the last one names."""
    size, storages = len(content), dict[str, UntypedStorage]()
    room = size

    def storage(name: str, length: int) -> UntypedStorage:
        nonlocal room
        if name not in storages:
            room -= length
            if room < 0:
                raise ValueError
            storages[name] = UntypedStorage(length)
        return storages[name]

    machine = _Machine(path, size, content[:LONGEST], storage)
    if (machine.run(), machine.run()) != (MAGIC, PROTOCOL):
        raise ValueError
    system: Any = machine.run()
    if not system["little_endian"]:
        raise InputError(f"{path} is of a machine that writes numbers the other way round: save it anew here")
    root, names = machine.run(), machine.run()
    if not isinstance(names, list) or len(names) != len(storages):
        raise ValueError
    place, mapped = machine.file.tell(), UntypedStorage.from_file(str(path), False, size)
    for name in names:
        place += 8  # the number of elements, which the pickle has too
        length = len(storages[name])
        if place + length > size:
            raise ValueError
        storages.pop(name).copy_(mapped[place : place + length])
        place += length
    return root


class _Machine:
    """Runs pickles that lie in a row: a stack, a memo, and what builds dictionaries and tensors.

    Args:
        path: named in messages.
        size: of the whole file, which no tensor may exceed.
        content: the pickles.
        storage: opens the tensors' storages.
    """

    def __init__(self, path: Path, size: int, content: bytes, storage: Opener) -> None:
        self.path, self.size, self.storage = path, size, storage
        self.file, self.steps, self.room = io.BytesIO(content), 0, len(content)
        self.stack: list[Any] = []
        self.marks: list[int] = []
        tensor, parameter, ordered, several = self._tensor, self._parameter, self._ordered, self._set
        self.calls: dict[str, Callable[..., Any]] = {
            "collections OrderedDict": ordered,
            "collections Counter": ordered,
            "builtins set": several,
            "__builtin__ set": several,
            "_codecs encode": self._bytes,
            "torch Size": lambda items: tuple(self._spend(items)),
            "torch._utils _rebuild_tensor": tensor,
            "torch._utils _rebuild_tensor_v2": tensor,
            "torch._utils _rebuild_tensor_v3": tensor,
            "torch._utils _rebuild_parameter": parameter,
            "torch._utils _rebuild_parameter_with_state": parameter,
            "torch.nn.parameter Parameter": parameter,
            # A module, which textual inversions hold: its parameters alone, of the state that follows.
            "torch.nn.modules.container ParameterDict": ordered,
        }

    def run(self) -> object:
        """What the next pickle holds."""
        stack, memo = self.stack, dict[int, Any]()
        value: Any
        for opcode, value, _ in pickletools.genops(self.file):
            self.steps += 1
            if self.steps > MOST_STEPS:
                raise InputError(
                    f"{self.path} has more than {MOST_STEPS:,} instructions: no weights need so many"
                )
            name = opcode.name
            if name in VALUES:
                stack.append(value)
            elif name in CONSTANTS:
                stack.append(CONSTANTS[name])
            elif name in ("BINPUT", "LONG_BINPUT"):
                memo[value] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[value])
            elif name == "GLOBAL":
                stack.append(self._global(value))
            elif name == "MARK":
                self.marks.append(len(stack))
            elif name == "EMPTY_DICT":
                stack.append({})
            elif name == "EMPTY_LIST":
                stack.append([])
            elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
                count = int(name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            elif name == "TUPLE":
                stack.append(tuple(self._marked()))
            elif name in ("APPEND", "APPENDS"):
                items = self._marked() if name == "APPENDS" else [stack.pop()]
                _only(list, stack[-1]).extend(items)
            elif name in ("SETITEM", "SETITEMS"):
                items = self._marked() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
                _only(dict, stack[-1]).update(zip(map(self._key, items[::2]), items[1::2], strict=True))
            elif name in ("REDUCE", "NEWOBJ"):
                arguments, call = _only(tuple, stack.pop()), stack.pop()
                stack.append(_Foreign() if isinstance(call, _Foreign) else call(*arguments))
            elif name == "BUILD":
                self._build(stack.pop(), stack[-1])
            elif name == "BINPERSID":
                stack.append(self._storage(*stack.pop()))
            elif name == "STOP":
                return stack.pop()
            elif name != "PROTO":
                raise ValueError
        raise ValueError

    def _marked(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def _global(self, name: str) -> object:
        """What a name stands for. Nothing else that comes onto the stack can be called."""
        if name in FOREIGN:
            return _Foreign()
        if name in DTYPES:
            return DTYPES[name]
        if name not in self.calls:
            asked = name.replace(" ", ".").removeprefix("builtins.").removeprefix("__builtin__.")
            raise InputError(f"{self.path} asks to run `{asked}`, which no weights need: refused")
        return self.calls[name]

    def _key(self, key: Any) -> Any:
        """A key that is hashed at once: tuples in tuples may take for ever, or overflow the stack."""
        if not isinstance(key, (str, bytes, int, float, _Foreign, type(None))):
            raise InputError(
                f"{self.path} has a {type(key).__name__} as a key, which no weights need: refused"
            )
        return key

    def _spend(self, items: Any) -> Any:
        """Counts what is copied: in all it exceeds the pickle's length only where the same is copied over and over."""
        self.room -= len(items)
        if self.room < 0:
            raise InputError(
                f"{self.path} copies its content again and again, which no weights need: refused"
            )
        return items

    def _ordered(self, items: Any = ()) -> dict[Any, Any]:
        pairs = items.items() if isinstance(items, dict) else items
        return {self._key(key): value for key, value in self._spend(pairs)}

    def _set(self, items: list[Any]) -> set[Any]:
        return set(map(self._key, self._spend(items)))

    def _bytes(self, text: str, encoding: str) -> bytes:
        if encoding not in ("latin1", "latin-1"):
            raise ValueError
        return _only(str, self._spend(text)).encode("latin1")

    def _build(self, state: Any, built: object) -> None:
        parameters = state.get("_parameters", {}) if isinstance(state, dict) else {}
        if isinstance(built, dict) and isinstance(parameters, dict):
            built.update(self._spend(parameters))
        elif not isinstance(built, _Foreign):
            raise ValueError

    def _storage(
        self, kind: str, dtype: Any, name: str, _: object, count: int, view: None = None
    ) -> _Storage:
        bytes_ = _only(int, count) * _only(torch.dtype, dtype).itemsize
        if kind != "storage" or view is not None or not 0 <= bytes_ <= self.size:
            raise ValueError
        return _Storage(self.storage(_only(str, name), bytes_), dtype)

    def _tensor(
        self,
        storage: _Storage,
        offset: int,
        size: tuple[int, ...],
        stride: tuple[int, ...],
        *others: object,
    ) -> Tensor:
        """A view of a storage. The others are whether it needs gradients, its hooks, and version 3's number format."""
        dtype = _only(torch.dtype, others[2]) if len(others) > 2 else _only(_Storage, storage).dtype
        if not len(size) == len(stride) <= MOST_AXES or any(
            type(n) is not int for n in (offset, *size, *stride)
        ):
            raise ValueError
        last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
        outside = last >= len(storage.content) // dtype.itemsize and 0 not in size
        if outside or min(offset, *size, *stride, 0) < 0:
            raise ValueError
        if max(size, default=0) > self.size or math.prod(size) * dtype.itemsize > self.size:
            raise InputError(f"{self.path} declares a tensor that is larger than the file: refused")
        return torch.empty(0, dtype=dtype).set_(storage.content, offset, size, stride)

    def _parameter(self, tensor: Tensor, *_: object) -> Tensor:
        return _only(Tensor, tensor)


def _only(kind: type, value: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError
    return value
