"""Files of weights: read by their content, matched with the modules that they are for, and written whole."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from stable_diffusion.checkpoints import pickles
from stable_diffusion.errors import InputError, three_of
from stable_diffusion.files import check_is_file, is_file, lacks_memory, reading, replacing

State = dict[str, Tensor]

PICKLED = (".ckpt", ".pt", ".pth", ".bin")

MOST_TENSORS = 100_000
"""Of a safetensors file, whose header could list millions; Stable Diffusion has 1,100."""


def sniff(path: Path) -> Literal["safetensors", "pickle"] | None:
    """What a file's first bytes say that it is, whatever its name."""
    with path.open("rb") as file:
        start = file.read(9)
    if start[8:] == b"{":  # the header, after its length
        return "safetensors"
    return "pickle" if start.startswith(pickles.STARTS) else None


def is_weights(path: Path) -> bool:
    """Whether a file's name or its content is that of weights."""
    return path.suffix.lower() in (".safetensors", *PICKLED) or sniff(path) is not None


def read_weights(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """What a file holds, its tensors mapped into memory, and a safetensors file's metadata.

    What a pickle has in ``state_dict`` is taken out of it, as training programs put tensors there.

    Raises:
        InputError: the file is missing, damaged, or asks to run something.
    """
    with reading(path):
        check_is_file(path)
        kind = sniff(path)
        if kind == "pickle" or (kind is None and path.suffix in PICKLED):
            root: dict[Any, Any] = pickles.read(path)
            for _ in range(3):  # it may nest, but a pickle may also hold itself
                inner = root.get("state_dict")
                root = {**root, "state_dict": None, **inner} if isinstance(inner, dict) else root
            return {str(name): value for name, value in root.items() if name != "state_dict"}, {}
        try:
            with safe_open(path, "pt") as file:
                names = file.keys()
                if len(names) > MOST_TENSORS:
                    raise InputError(
                        f"{path} lists {len(names):,} tensors, at most {MOST_TENSORS:,} are read: refused"
                    )
                return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
        except InputError:
            raise
        except (SafetensorError, OSError, ValueError, TypeError, RuntimeError) as error:
            if lacks_memory(error):
                raise
            reason = str(error).split("\n")[0]
            message = f"{path} is not a whole safetensors file ({reason}): copy or download it again"
            raise InputError(message) from None


def read_tensors(path: Path) -> State:
    """The tensors of a part's file in a model folder. Raises InputError where it holds anything else."""
    if not is_file(path):
        raise InputError(f"{path} does not exist: a model folder needs it")
    content, _ = read_weights(path)
    if strange := sorted(name for name, value in content.items() if not isinstance(value, Tensor)):
        raise InputError(
            f"{path} holds other things than tensors ({three_of(strange)}): these are not the weights of a part"
        )
    return content


def write_tensors(
    path: Path,
    state: State,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
    *,
    new: bool = False,
) -> None:
    """Writes a safetensors file, and the folder that it is in.

    Args:
        path: the file.
        state: the tensors.
        dtype: number format of the file; None keeps the tensors'.
        metadata: what its header says beside the format.
        new: whether a file that is there then is an error, not replaced.

    Raises:
        InputError: what the system refuses.
    """
    with replacing(path, new=new) as building:
        tensors = {
            name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None).contiguous()
            for name, tensor in state.items()
        }
        try:
            save_file(tensors, building, metadata={"format": "pt", **(metadata or {})})
        except SafetensorError as error:
            if number := re.search(r"os error (\d+)", str(error)):
                raise OSError(int(number[1]), os.strerror(int(number[1]))) from None
            raise


def count(names: Iterable[str], total: int) -> str:
    """A number of tensors, and three of their names."""
    names = sorted(names)
    return f"{len(names)} of {total} tensors ({three_of(names)})"


def mismatch(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str | None:
    """Why tensors cannot be those of a module, whose own are given, as the end of a sentence; None where they can."""
    wrong = [name for name in wanted.keys() & found.keys() if wanted[name].shape != found[name].shape]
    for problem, names in (
        ("missing", wanted.keys() - found.keys()),
        ("unexpected", found.keys() - wanted.keys()),
        ("of another shape", wrong),
    ):
        if names:
            return f"{count(names, len(wanted))} are {problem}"
    return None


@contextmanager
def building(problem: str) -> Iterator[None]:
    """Modules made inside get no memory for their weights, but names and shapes.

    Raises:
        InputError: none can be built; `problem` is how the sentence begins.
    """
    try:
        with torch.device("meta"):
            yield
    except InputError:
        raise
    except (ArithmeticError, LookupError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]  # without the frames of C++ code that may follow
        raise InputError(f"{problem} ({reason})") from None


def assign(name: str, module: nn.Module, state: State, dtype: torch.dtype) -> None:
    """Makes `state` the module's weights, and empties it. Raises InputError where names or shapes do not fit."""
    if reason := mismatch(module.state_dict(), state):
        raise InputError(f"the weights of {name} do not fit its configuration: {reason}")
    trainable = {key: parameter.requires_grad for key, parameter in module.named_parameters()}
    # One by one, each taken from `state`: both formats of all weights are never in memory.
    module.load_state_dict({key: state.pop(key).to(dtype) for key in list(state)}, assign=True)
    for key, parameter in module.named_parameters():
        parameter.requires_grad_(trainable[key])
