"""Pickles of PyTorch: tensors and known foreign objects come through; anything else is named and never run."""

from __future__ import annotations

import json
import os
import pickle
import sys
import time
import types
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stable_diffusion.checkpoints import pickles, single_file
from stable_diffusion.checkpoints.files import read_weights
from stable_diffusion.checkpoints.info import describe
from stable_diffusion.errors import InputError

WEIGHTS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.float16)}


class Runs:
    """What a hostile file holds: unpickling it calls a function."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


@contextmanager
def lightning() -> Iterator[type]:
    """The class that real checkpoints name, there while they are written."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    module: Any = types.ModuleType(name)
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": name})
    parents = [name.rsplit(".", i)[0] for i in (2, 1)]
    sys.modules |= {name: module} | {parent: types.ModuleType(parent) for parent in parents}
    try:
        yield module.ModelCheckpoint
    finally:
        for each in (*parents, name):
            del sys.modules[each]


@pytest.mark.parametrize("zipped", [True, False])
def test_reads_what_real_checkpoints_hold(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "model.ckpt"
    with lightning() as callback:
        root = {
            "state_dict": WEIGHTS,
            "global_step": 110000,
            "callbacks": {
                callback: {"best_model_score": np.float64(3), "best_k_models": {}, "array": np.ones(3)}
            },
            "bytes": b"\xff",
            "set": {1},
        }
        if zipped:  # the legacy form stores the source text of modules beside them, and is refused
            root["parameters"] = torch.nn.ParameterDict({"*": torch.nn.Parameter(torch.ones(1, 4))})
        torch.save(root, path, _use_new_zipfile_serialization=zipped)
    found = pickles.read(path)
    assert found["global_step"] == 110000 and found["set"] == {1}
    assert "pytorch_lightning" not in sys.modules
    for name, tensor in WEIGHTS.items():
        assert torch.equal(found["state_dict"][name], tensor)
    if zipped:
        assert torch.equal(found["parameters"]["*"], torch.ones(1, 4))
    assert len(found["callbacks"]) == 1


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_equal_those_that_torch_reads(tmp_path: Path, zipped: bool) -> None:
    base = torch.randn(10, 12, generator=torch.Generator().manual_seed(0))
    tensors = {"whole": base, "turned": base.t(), "part": base[2:5, ::2], "scalar": torch.tensor(3.0)}
    tensors |= {"empty": torch.empty(0, 4), "parameter": torch.nn.Parameter(base[0])}
    tensors |= {"expanded": torch.arange(7).expand(3, 7)}
    names = "float64 bfloat16 float16 int64 int32 int16 int8 uint8 bool"
    for name in (
        names + " uint16 float8_e4m3fn" * zipped
    ).split():  # torch reads these from zip archives alone
        tensors[name] = torch.ones(5).to(getattr(torch, name))
    rest = {"numbers": [1, -5, 2**40, 2.5, None, True, (1, 2, 3, 4)], "size": base.shape, "text": "ü"}
    rest |= {"milestones": Counter({3: 1}), "dtype": torch.float32}
    path = tmp_path / "a.pt"
    torch.save({"state_dict": OrderedDict(tensors), **rest}, path, _use_new_zipfile_serialization=zipped)
    found, wanted = pickles.read(path), torch.load(path, weights_only=True)
    for name, theirs in wanted.pop("state_dict").items():
        ours = found["state_dict"][name]
        assert (ours.dtype, ours.shape, ours.stride()) == (theirs.dtype, theirs.shape, theirs.stride())
        assert ours.untyped_storage().tolist() == theirs.untyped_storage().tolist() and len(tensors) > 15
    assert {name: found[name] for name in rest} == wanted
    whole, turned = found["state_dict"]["whole"], found["state_dict"]["turned"]
    assert whole.data_ptr() == turned.data_ptr(), "what is shared stays so"


def test_a_bare_tensor_gets_the_empty_name(tmp_path: Path) -> None:
    torch.save(WEIGHTS["a"], tmp_path / "a.pt")
    assert torch.equal(pickles.read(tmp_path / "a.pt")[""], WEIGHTS["a"])


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("function", "name"),
    [
        (os.system, f"{os.name}.system"),
        (eval, "eval"),
        (exec, "exec"),
        (print, "print"),
        (getattr, "getattr"),
    ],
)
def test_code_is_named_and_not_run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], function: Callable[..., Any], name: str, zipped: bool
) -> None:
    path = tmp_path / "hostile.ckpt"
    command = (
        f"touch {tmp_path / 'ran'}" if function is os.system else f"open({str(tmp_path / 'ran')!r}, 'w')"
    )
    torch.save(
        {"state_dict": WEIGHTS, "x": Runs(function, command)}, path, _use_new_zipfile_serialization=zipped
    )
    with pytest.raises(InputError) as caught:
        pickles.read(path)
    assert str(caught.value) == f"{path} asks to run `{name}`, which no weights need: refused"
    assert not (tmp_path / "ran").exists() and capfd.readouterr().out == ""


def pickled(path: Path, body: bytes, storage: bytes = b"") -> Path:
    """A zip archive with a pickle of these instructions, and one storage."""
    return zip_with(path, data_pkl=b"\x80\x02" + body + b".", **{"data/0": storage})


def text(value: str) -> bytes:
    return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()


def tensor(size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0, count: int = 4) -> bytes:
    """The instructions for a tensor in float32 of the storage "0"."""
    where = (
        b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + number(count) + b"tQ"
    )
    shape = b"".join(b"(" + b"".join(map(number, each)) + b"t" for each in (size, stride))
    arguments = b"(" + where + number(offset) + shape + b"\x89}t"
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"R"


def number(value: int) -> bytes:
    content = pickle.encode_long(value)
    return b"\x8a" + bytes([len(content)]) + content


LONG = b"X" + (10**5).to_bytes(4, "little") + b"a" * 10**5 + b"q\x00"
HOSTILE = {
    "a key nested deeply": (b"}" + b")" + b"\x85" * 300_000 + b"Ns", "tuple as a key"),
    "a set of the same": (b"cbuiltins\nset\n](" + b")" + b"\x85" * 300_000 + b"e\x85R", "tuple as a key"),
    "a key of doubled pairs": (b"}" + b")q\x00" + b"h\x00\x86q\x00" * 60 + b"Ns", "tuple as a key"),
    "doubled pairs that are called": (b")q\x00" + b"h\x00\x86q\x00" * 60 + b")R", "damaged"),
    "bytes of a number": (
        b"cbuiltins\nbytearray\n" + number(3 * 10**9) + b"\x85R",
        "asks to run `bytearray`",
    ),
    "a storage of a number": (
        b"ctorch.storage\nUntypedStorage\n" + number(3 * 10**9) + b"\x85\x81",
        "damaged",
    ),
    "a chain of encodings": (b"c_codecs\nencode\n" + text("ab") + text("hex") + b"\x86R", "damaged"),
    "a text that is encoded again and again": (
        b"c_codecs\nencode\nq\x01" + LONG + text("latin1") + b"\x86q\x02" + b"h\x01h\x02R" * 50_000,
        "copies its content again and again",
    ),
    "a list that is copied again and again": (
        b"ctorch\nSize\nq\x01](" + b"N" * 10**5 + b"e\x85q\x02" + b"h\x01h\x02R" * 50_000,
        "copies its content again and again",
    ),
    "instructions without end": (b"N" * 1_000_001, "more than 1,000,000 instructions"),
    "a memo of four billion places": (b"Nr\xff\xff\xff\xff", "holds a NoneType"),
    "a text that is longer than the file": (b"X\xff\xff\xff\x7fabc", "damaged"),
    "an instruction of another protocol": (b"\x8d" + bytes([255] * 8) + b"abc", "damaged"),
    "a number of 64 MB": (b"\x8b" + (2**26).to_bytes(4, "little") + bytes(100), "damaged"),
    "a storage larger than the file": (tensor((1,), (1,), count=10**10), "damaged"),
    "a storage of a negative size": (tensor((0,), (1,), count=-4), "damaged"),
    "a tensor that leaves its storage": (tensor((5,), (1,)), "damaged"),
    "a tensor that begins behind it": (tensor((1,), (1,), offset=4), "damaged"),
    "a tensor that begins before it": (tensor((1,), (1,), offset=-1), "damaged"),
    "a tensor of negative steps": (tensor((2, 2), (-1, 2), offset=1), "damaged"),
    "a tensor of negative length": (tensor((-1, -4), (1, 1)), "damaged"),
    "a tensor that repeats its numbers": (tensor((10**12,), (0,)), "larger than the file"),
    "an empty tensor of endless length": (tensor((0, 2**62, 2**62), (1, 1, 1)), "larger than the file"),
    "a tensor of many axes": (tensor((1,) * 65, (1,) * 65), "damaged"),
    "a sparse tensor": (
        b"ctorch._utils\n_rebuild_sparse_tensor\n)R",
        "asks to run `torch._utils._rebuild_sp",
    ),
    "a function that is not one": (b"K\x01)R", "damaged"),
    "arguments that are none": (b"ccollections\nOrderedDict\nK\x01R", "damaged"),
    "an empty stack": (b"0" * 5, "damaged"),
    "a mark that is not there": (b"t", "damaged"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_crashes_hangs_or_fills_the_memory_is_refused(tmp_path: Path, case: str) -> None:
    body, match = HOSTILE[case]
    path = pickled(tmp_path / "a.ckpt", body, bytes(16))
    started = time.monotonic()
    with pytest.raises(InputError, match=match):
        pickles.read(path)
    assert time.monotonic() - started < 10
    assert sane(tmp_path), "the instructions of the tests make a tensor"


def sane(folder: Path) -> bool:
    numbers = torch.arange(4.0)
    path = pickled(
        folder / "sane.ckpt", b"}" + text("a") + tensor((2, 2), (2, 1)) + b"s", numbers.numpy().tobytes()
    )
    return torch.equal(pickles.read(path)["a"], numbers.reshape(2, 2))


def test_nothing_of_torch_unpickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(WEIGHTS, tmp_path / "a.pt")
    monkeypatch.setattr(torch, "load", None)
    assert pickles.read(tmp_path / "a.pt").keys() == WEIGHTS.keys()


def test_numbers_of_another_byte_order_are_refused(tmp_path: Path) -> None:
    path = zip_with(tmp_path / "a.pt", data_pkl=b"\x80\x02}.", byteorder=b"big")
    with pytest.raises(InputError, match="the other way round"):
        pickles.read(path)


def test_a_foreign_class_is_named(tmp_path: Path) -> None:
    torch.save({"x": zipfile.ZipInfo("a")}, tmp_path / "a.bin")
    with pytest.raises(InputError, match=r"asks to run `zipfile.ZipInfo`"):
        pickles.read(tmp_path / "a.bin")


def zip_with(path: Path, *, compression: int = zipfile.ZIP_STORED, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(f"a/{name.replace('_', '.')}", content)
    return path


def test_a_zip_bomb_is_refused_before_it_opens(tmp_path: Path) -> None:
    bomb = zip_with(tmp_path / "bomb.ckpt", compression=zipfile.ZIP_DEFLATED, data_pkl=bytes(50_000_000))
    assert bomb.stat().st_size < 100_000
    with pytest.raises(InputError, match=r"declares 50,000,000 bytes .* refused as a zip bomb"):
        pickles.read(bomb)
    # Stored members that lie about their sizes, or share their bytes.
    path = tmp_path / "lie.ckpt"
    torch.save(WEIGHTS, path)
    with zipfile.ZipFile(path) as archive:
        offset = archive.start_dir
    content = bytearray(path.read_bytes())
    content[offset + 24 : offset + 28] = (2**31).to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(InputError, match="refused as a zip bomb"):
        pickles.read(path)


def test_files_of_other_kinds_are_refused(tmp_path: Path) -> None:
    def refused(content: bytes | None, match: str) -> None:
        path = tmp_path / "a.ckpt"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(InputError, match=match):
            pickles.read(path)

    refused(b"", "is empty")
    refused(b"hello, world", "is not a file of PyTorch")
    refused(b"PK\x03\x04" + bytes(100), "truncated, damaged")
    refused(pickle.dumps({"a": 1}, protocol=4), "not a file of weights")
    refused(pickle.dumps({"a": 1}, protocol=2), "not a file of weights")
    zip_with(tmp_path / "a.ckpt", readme_txt=b"hello")
    refused(None, "a zip archive without weights")
    torch.save([1, 2], tmp_path / "a.ckpt")
    refused(None, "holds a list")
    with pytest.raises(InputError, match="is not a file"):
        read_weights(tmp_path)


@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_anywhere_is_one_sentence(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "whole.ckpt"
    torch.save({"state_dict": WEIGHTS}, path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    for end in {1, 2, 4, 10, 100, *range(200, len(content), 97), len(content) - 1}:
        (tmp_path / "cut.ckpt").write_bytes(content[:end])
        with pytest.raises(InputError) as caught:
            pickles.read(tmp_path / "cut.ckpt")
        assert "\n" not in str(caught.value) and "weights_only" not in str(caught.value)


def test_a_legacy_file_that_declares_more_than_it_holds(tmp_path: Path) -> None:
    path, declared = tmp_path / "a.ckpt", 7**6
    torch.save({"a": torch.ones(declared)[:1]}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    old, new = (b"J" + number.to_bytes(4, "little") for number in (declared, 2**31 - 1))
    assert old in content
    path.write_bytes(content[:4000].replace(old, new))
    with pytest.raises(InputError):
        pickles.read(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_tensor_that_repeats_its_numbers_is_refused(tmp_path: Path, zipped: bool) -> None:
    nested = {"state_dict": [{"a": torch.ones(1).expand(10**12)}]}
    torch.save(nested, tmp_path / "a.ckpt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match="declares a tensor that is larger than the file"):
        pickles.read(tmp_path / "a.ckpt")


def test_a_file_that_holds_itself_comes_to_an_end(tmp_path: Path) -> None:
    root: dict[str, Any] = {"a": WEIGHTS["a"]}
    root["state_dict"] = root["list"] = root
    for _ in range(100):
        root["list"] = [root["list"], root["list"]]
    torch.save(root, tmp_path / "a.ckpt")
    assert pickles.read(tmp_path / "a.ckpt").keys() == {"a", "state_dict", "list"}
    with pytest.raises(InputError, match=r"none of Stable Diffusion|textual inversion"):
        single_file.read(tmp_path / "a.ckpt")
    assert "vectors" in list(describe(tmp_path / "a.ckpt"))[1]


@pytest.mark.parametrize("shape", [[-1], [0, 2**64 - 1], [2], [2**62, 2**62]])
def test_a_safetensors_header_of_impossible_shapes_is_one_sentence(tmp_path: Path, shape: list[int]) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(InputError, match="is not a whole safetensors file") as caught:
        read_weights(path)
    assert "\n" not in str(caught.value)


def test_a_safetensors_header_of_endless_tensors_is_refused(tmp_path: Path) -> None:
    entry = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    header = ("{" + ",".join(f'"{i}":{entry}' for i in range(100_001)) + "}").encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(InputError, match="lists 100,001 tensors"):
        read_weights(path)
