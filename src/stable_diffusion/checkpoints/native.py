"""Our model folders: ``config.json`` and one safetensors file a part, under diffusers' and transformers' names.

    config.json
    unet/diffusion_pytorch_model.safetensors
    vae/diffusion_pytorch_model.safetensors
    text_encoder/model.safetensors   tokenizer/…       (text_encoder_2, tokenizer_2 … where there are several)
    text_projection/model.safetensors                  (where the encoders' widths are projected)

A frozen text encoder that the package carries is not written again: the configuration names it.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

from stable_diffusion import files
from stable_diffusion.checkpoints.checkpoint import Checkpoint, packaged, published_text_state, text_state
from stable_diffusion.checkpoints.files import State, read_tensors, write_tensors
from stable_diffusion.config import ModelConfig, TextEncoderConfig, from_dict, to_dict
from stable_diffusion.errors import InputError
from stable_diffusion.files import is_file, read_bytes, read_json, replacing_folder, write_json
from stable_diffusion.nn.tokenizer import FILES, SETTINGS

UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
PROJECTION = "text_projection/model.safetensors"
TOKENIZER_FILES = (*(name for names in FILES.values() for name in names), "tokenizer.json", *SETTINGS)
OURS = re.compile(
    rf"config\.json|{UNET}|{VAE}|{PROJECTION}|text_encoder(_\d+)?/model\.safetensors"
    rf"|tokenizer(_\d+)?/({'|'.join(map(re.escape, TOKENIZER_FILES))})"
)
"""The files of a model: what replacing one may remove."""
PART = re.compile(r"unet|vae|text_projection|(text_encoder|tokenizer)(_\d+)?")
"""The folders that they are in."""


def is_native(folder: Path) -> bool:
    """Whether a folder is one of ours."""
    return is_file(folder / "config.json") and not is_file(folder / "model_index.json")


def read(folder: Path) -> Checkpoint:
    """The checkpoint in one of our folders. Raises InputError for a damaged or incomplete one."""
    config = from_dict(ModelConfig, read_json(folder / "config.json"))
    states, tokenizers = [], []
    for i, text_config in enumerate(config.text_encoders):
        path = folder / _numbered("text_encoder", i)
        written = is_file(path / "model.safetensors")
        tokenizer = folder / _numbered("tokenizer", i)
        states.append(read_text_encoder(path, text_config) if written else packaged_text_encoder(text_config))
        if not states[-1]:
            raise InputError(f"{path / 'model.safetensors'} does not exist: the model folder is incomplete")
        carried = text_config.packaged is not None and not tokenizer.is_dir()
        tokenizers.append(packaged(str(text_config.packaged)) if carried else tokenizer)
    projections = read_tensors(folder / PROJECTION) if is_file(folder / PROJECTION) else {}
    vae, unet = read_tensors(folder / VAE), read_tensors(folder / UNET)
    return Checkpoint(config, vae, unet, states, tokenizers, projections)


def read_text_encoder(folder: Path, config: TextEncoderConfig) -> State:
    """The tensors of a published text encoder folder (``model.safetensors``)."""
    return text_state(read_tensors(folder / "model.safetensors"), config)


def packaged_text_encoder(config: TextEncoderConfig) -> State:
    """The tensors of the text encoder that the package carries under that name; none where it is a tokenizer."""
    folder = packaged(str(config.packaged))
    return read_text_encoder(folder, config) if is_file(folder / "model.safetensors") else {}


def _is_carried(state: State, config: TextEncoderConfig) -> bool:
    """Whether the package holds these very weights."""
    carried = packaged_text_encoder(config)
    return bool(carried) and all(
        torch.equal(state[name].cpu(), tensor.to(state[name].dtype)) for name, tensor in carried.items()
    )


def write(folder: Path, checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> None:
    """Writes a model folder beside its final name, then puts it in place; an older model there is replaced.

    Args:
        folder: the model folder.
        checkpoint: what to write.
        dtype: number format of the file; None keeps the tensors'.

    Raises:
        InputError: there is something at `folder` that is not a model folder, or it cannot be written.
    """
    check_place(folder)
    with replacing_folder(folder, OURS.fullmatch) as building:
        write_tensors(building / UNET, checkpoint.unet, dtype)
        write_tensors(building / VAE, checkpoint.vae, dtype)
        if checkpoint.projections:
            write_tensors(building / PROJECTION, checkpoint.projections, dtype)
        for i, config in enumerate(checkpoint.config.text_encoders):
            if not config.trainable and _is_carried(checkpoint.text_encoders[i], config):
                continue
            state = published_text_state(checkpoint.text_encoders[i], config)
            write_tensors(building / _numbered("text_encoder", i) / "model.safetensors", state, dtype)
            target = building / _numbered("tokenizer", i)
            target.mkdir()
            for path in checkpoint.tokenizer_files[i]:
                (target / path.name).write_bytes(read_bytes(path))
        write_json(building / "config.json", to_dict(checkpoint.config))


def check_place(folder: Path, size: int = 0) -> None:
    """Raises InputError where a model folder of so many bytes cannot be written, as ``write`` does."""
    with files.writing(folder):
        if folder.exists() and not _is_replaceable(folder):
            raise InputError(
                f"{folder} exists and is not a model folder of this project: choose another name"
            )
        for path in folder.iterdir() if folder.exists() else ():
            if PART.fullmatch(path.name) and (path.is_symlink() or not path.is_dir()):
                raise InputError(
                    f"{path} is no folder of this project and would be in the way: choose another name"
                )
    files.check_place(folder, is_folder=True, size=size)


def _is_replaceable(folder: Path) -> bool:
    """Whether nothing of anyone else's is at `folder`: it is empty, or one of our models."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return folder.is_dir()
    try:
        return is_native(folder) and {"unet", "vae"} <= read_json(folder / "config.json").keys()
    except InputError as error:
        if isinstance(error.__cause__, PermissionError):
            raise
        return False


def _numbered(name: str, index: int) -> str:
    """``text_encoder``, ``text_encoder_2`` …: diffusers' way of counting."""
    return name if index == 0 else f"{name}_{index + 1}"
