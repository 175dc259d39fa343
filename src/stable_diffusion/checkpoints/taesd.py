"""Autoencoders of their own, to take the place of a model's: TAESD (madebyollin/taesd), and Stable Diffusion's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from stable_diffusion.checkpoints import single_file
from stable_diffusion.checkpoints.diffusers.settings import autoencoder_config, vae_settings
from stable_diffusion.checkpoints.diffusers.weights import vae_state
from stable_diffusion.checkpoints.families import kind
from stable_diffusion.checkpoints.files import State, assign, building, read_weights
from stable_diffusion.config import SD15, TAESD, AutoencoderKLConfig, AutoencoderTinyConfig, ModelConfig
from stable_diffusion.errors import InputError
from stable_diffusion.files import is_file, read_json, reading
from stable_diffusion.nn.blocks import Placed
from stable_diffusion.nn.vae import AutoencoderKL, AutoencoderTiny, autoencoder

ENDINGS = ("safetensors", "fp16.safetensors", "bin", "fp16.bin")
WEIGHTS = [f"diffusion_pytorch_model.{ending}" for ending in ENDINGS]
PAIRS = [f"taesd_decoder.{ending}" for ending in ("safetensors", "pth")]


def read_vae(path: Path) -> tuple[AutoencoderKLConfig | AutoencoderTinyConfig, State]:
    """The autoencoder at `path`, told by its content.

    A folder of diffusers' ``AutoencoderKL`` or ``AutoencoderTiny``, or one that has it in ``vae``; a file of such
    a folder; TAESD's own two files, of which either is named; CompVis' layout, alone or in a whole model.

    Raises:
        InputError: nothing there, damaged files, or no such autoencoder.
    """
    if path.is_dir():
        folder = path / "vae" if (path / "vae").is_dir() else path
        for name in (*WEIGHTS, *PAIRS):
            if is_file(folder / name):
                return read_vae(folder / name)
        raise InputError(f"{path} has no autoencoder: it needs {WEIGHTS[0]} or {PAIRS[0]}")
    tensors = _tensors(path)
    found = kind(tensors)
    if found not in ("taesd", "diffusers vae"):
        return single_file.read_vae(path)
    if found == "taesd" and all(name.partition(".")[0].isdecimal() for name in tensors):
        return TAESD, _pair(path)
    settings = _settings(path.with_name("config.json"))
    if not settings:
        settings = {"_class_name": "AutoencoderTiny"} if found == "taesd" else vae_settings(SD15)
    return autoencoder_config(settings), tensors if found == "taesd" else vae_state(tensors)


def _pair(path: Path) -> State:
    """The tensors of TAESD's two files. Its decoder's numbers begin with the squashing, which has no weights."""
    state = {}
    for part, first in (("encoder", 0), ("decoder", 1)):
        name = path.name.replace("encoder", part).replace("decoder", part)
        if part not in name:
            raise InputError(f"{path} is one of TAESD's two files: name them taesd_encoder and taesd_decoder")
        if not is_file(path.with_name(name)):
            raise InputError(f"{path} is one of TAESD's two files: {name} must lie beside it")
        for key, tensor in _tensors(path.with_name(name)).items():
            number, _, rest = key.partition(".")
            state[f"{part}.layers.{int(number) - first if number.isdecimal() else number}.{rest}"] = tensor
    return state


def _tensors(path: Path) -> State:
    return {name: value for name, value in read_weights(path)[0].items() if isinstance(value, Tensor)}


def _settings(path: Path) -> dict[str, Any]:
    """The settings in a file beside the weights; empty where that file does not exist or is another part's."""
    settings = read_json(path) if is_file(path) else {}
    return settings if str(settings.get("_class_name", "")).startswith("Autoencoder") else {}


def with_vae(path: Path, model: ModelConfig) -> tuple[ModelConfig, State]:
    """A model's configuration with the autoencoder at `path`, and its tensors. The U-Net keeps its size of latents.

    Raises InputError as ``read_vae`` does, and for an autoencoder of other latents.
    """
    with reading(path):
        vae, state = read_vae(path)
    if vae.latent_channels != model.vae.latent_channels:
        raise InputError(
            f"the autoencoder {path} has {vae.latent_channels} latent channels,"
            f" the model {model.name!r} {model.vae.latent_channels}"
        )
    return replace(model, vae=vae, sample_size=model.sample_size // model.vae.factor * vae.factor), state


def load(path: Path, model: ModelConfig, like: Placed) -> tuple[ModelConfig, AutoencoderKL | AutoencoderTiny]:
    """``with_vae``, and the autoencoder itself where one of the model's networks is and in its number format."""
    config, state = with_vae(path, model)
    with building(f"{path} describes an autoencoder that cannot be built"):
        vae = autoencoder(config.vae)
    assign("vae", vae, state, like.dtype)
    return config, vae.to(like.device).eval()
