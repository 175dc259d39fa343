"""Pickles of PyTorch: tensors and known foreign objects come through; anything else is named and never run."""

from __future__ import annotations

import os
import pickle
import sys
import types
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stable_diffusion.checkpoints import pickles, single_file
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
    assert not set(pickles.STAND_INS) & set(torch.serialization.get_safe_globals()), "nothing stays allowed"


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
        pickles.read(tmp_path)


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
