"""Our model folders: ``config.json`` and one safetensors file a part, under diffusers' and transformers' names.

    config.json
    unet/diffusion_pytorch_model.safetensors
    vae/diffusion_pytorch_model.safetensors
    text_encoder/model.safetensors   tokenizer/…       (text_encoder_2, tokenizer_2 … where there are several)
    text_projection/model.safetensors                  (where the encoders' widths are projected)

A frozen text encoder that the package carries is not written again: the configuration names it.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file

from stable_diffusion.checkpoints.checkpoint import (
    Checkpoint,
    State,
    packaged,
    published_text_state,
    read_tensors,
    text_state,
)
from stable_diffusion.config import ModelConfig, TextEncoderConfig, from_dict, to_dict
from stable_diffusion.errors import InputError

UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
PROJECTION = "text_projection/model.safetensors"


def is_native(folder: Path) -> bool:
    """Whether a folder is one of ours."""
    return (folder / "config.json").is_file() and not (folder / "model_index.json").is_file()


def read(folder: Path) -> Checkpoint:
    """The checkpoint in one of our folders. Raises InputError for a damaged or incomplete one."""
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(
            f"{folder / 'config.json'} is not JSON ({error}): copy the model folder again"
        ) from None
    if not isinstance(settings, dict):
        raise InputError(f"{folder / 'config.json'} must hold a JSON object: copy the model folder again")
    config = from_dict(ModelConfig, settings)
    states, tokenizers = [], []
    for i, text_config in enumerate(config.text_encoders):
        path = folder / _numbered("text_encoder", i)
        written = (path / "model.safetensors").is_file()
        tokenizer = folder / _numbered("tokenizer", i)
        if not written and text_config.packaged is None:
            raise InputError(f"{path / 'model.safetensors'} does not exist: the model folder is incomplete")
        states.append(read_text_encoder(path, text_config) if written else packaged_text_encoder(text_config))
        tokenizers.append(tokenizer if tokenizer.is_dir() else packaged(str(text_config.packaged)))
    projections = read_tensors(folder / PROJECTION) if (folder / PROJECTION).is_file() else {}
    return Checkpoint(
        config, read_tensors(folder / VAE), read_tensors(folder / UNET), states, tokenizers, projections
    )


def read_text_encoder(folder: Path, config: TextEncoderConfig) -> State:
    """The tensors of a published text encoder folder (``model.safetensors``)."""
    return text_state(read_tensors(folder / "model.safetensors"), config)


def packaged_text_encoder(config: TextEncoderConfig) -> State:
    """The tensors of the text encoder that the package carries under that name; none where it is a tokenizer."""
    path = _carried(config)
    return read_text_encoder(path.parent, config) if path.is_file() else {}


def _carried(config: TextEncoderConfig) -> Path:
    return packaged(str(config.packaged)) / "model.safetensors"


def _is_carried(state: State, config: TextEncoderConfig) -> bool:
    """Whether the package holds these very weights."""
    carried = packaged_text_encoder(config)
    return bool(carried) and all(
        torch.equal(state[name].cpu(), tensor.to(state[name].dtype)) for name, tensor in carried.items()
    )


def write(
    folder: Path, checkpoint: Checkpoint, tokenizer_files: list[list[Path]], dtype: torch.dtype | None = None
) -> None:
    """Writes a model folder beside its final name, then puts it in place; an older model there is replaced.

    Args:
        folder: the model folder.
        checkpoint: what to write.
        tokenizer_files: the files of each text encoder's tokenizer.
        dtype: number format of the file; None keeps the tensors'.

    Raises:
        InputError: there is something at `folder` that is not a model folder.
    """
    if folder.exists() and not _is_replaceable(folder):
        raise InputError(f"{folder} exists and is no model folder of this project: choose another name")
    with beside(folder) as building:
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
            for path in tokenizer_files[i]:
                shutil.copyfile(path, target / path.name)
        text = json.dumps(to_dict(checkpoint.config), indent=2, ensure_ascii=False)
        (building / "config.json").write_text(text + "\n", encoding="utf-8")


@contextmanager
def beside(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder`, to be filled with parts, which takes its place unless an error is raised."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield building
        # What others may read is for the umask to say; temporary folders and safetensors leave them nothing.
        building.chmod(next(path for path in building.iterdir() if path.is_dir()).stat().st_mode)
        for path in building.rglob("*.safetensors"):
            path.chmod(next(building.rglob("*.json")).stat().st_mode)
        _put_in_place(building, folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def write_tensors(path: Path, state: State, dtype: torch.dtype | None) -> None:
    """Writes a new safetensors file, and the folder that it is in. None keeps the tensors' number format."""
    path.parent.mkdir(parents=True)
    tensors = {
        name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None).contiguous()
        for name, tensor in state.items()
    }
    save_file(tensors, path, metadata={"format": "pt"})


def _put_in_place(building: Path, folder: Path) -> None:
    if not folder.exists():
        building.replace(folder)
        return
    older = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
    aside = older / "model"
    try:
        folder.replace(aside)
        building.replace(folder)
    except BaseException:
        if aside.exists() and not folder.exists():
            aside.replace(folder)
        older.rmdir()
        raise
    shutil.rmtree(older)


def _is_replaceable(folder: Path) -> bool:
    """Whether nothing of anyone else's is at `folder`: it is empty, or one of our models."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return folder.is_dir()
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return is_native(folder) and isinstance(settings, dict) and {"unet", "vae"} <= settings.keys()


def _numbered(name: str, index: int) -> str:
    """``text_encoder``, ``text_encoder_2`` …: diffusers' way of counting."""
    return name if index == 0 else f"{name}_{index + 1}"
