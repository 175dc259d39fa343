"""A file of weights, whatever its name says: safetensors, or one of PyTorch's pickles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from stable_diffusion.checkpoints import pickles
from stable_diffusion.errors import InputError

PICKLED = (".ckpt", ".pt", ".pth", ".bin")


def read_weights(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """What a file holds, its tensors mapped into memory, and a safetensors file's metadata.

    Raises:
        InputError: the file is missing, damaged, or asks to run something.
    """
    if not path.is_file():
        raise InputError(f"{path} is no file: give a .safetensors, .ckpt, .pt or .bin file")
    with path.open("rb") as opened:
        start = opened.read(9)
    pickled = start[:2] == b"PK" or start[:1] == b"\x80" or path.suffix in PICKLED or not start
    if pickled and start[8:] != b"{":  # there the header of safetensors begins
        return {str(name): value for name, value in pickles.read(path).items()}, {}
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{path} is not a whole safetensors file ({error}): copy or download it again"
        ) from None
