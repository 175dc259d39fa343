"""Reading a single file, of a whole model or of one part."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from stable_diffusion.checkpoints import families
from stable_diffusion.checkpoints.checkpoint import Checkpoint, packaged
from stable_diffusion.checkpoints.families import CLIP, EMA, OPEN_CLIP, UNET, VAE
from stable_diffusion.checkpoints.files import State, building, count, mismatch, read_weights
from stable_diffusion.checkpoints.single_file import names
from stable_diffusion.checkpoints.single_file.infer import File, has_gaps, model_config, vae_config
from stable_diffusion.checkpoints.single_file.write import CONFIG, check_fits
from stable_diffusion.config import AutoencoderKLConfig, ModelConfig, TextEncoderConfig, UNetConfig, from_dict
from stable_diffusion.errors import InputError
from stable_diffusion.files import json_object
from stable_diffusion.nn.text import TextEncoder
from stable_diffusion.nn.unet import UNet
from stable_diffusion.nn.vae import AutoencoderKL

# What sampling does not need: the schedule's 12 tables, counters, losses, position numbers, CLIP's head.
UNUSED = re.compile(
    r"^\w*alphas_cumprod(_prev)?$|^betas$|^posterior_\w+$|^scale_factor$|^model_ema\.(?!diffusion_model)|"
    r"^ztsnr$|position_ids$|^first_stage_model\.(loss|model_ema)\.|"
    r"^cond_stage_model\.\w+\.(text_model\.)?(text_projection|logit_scale|attn_mask)"
)


def read(path: Path, *, prediction_type: str | None = None, ema: bool = False) -> Checkpoint:
    """The model in a single file; autoencoder and text encoder are empty where it has none.

    Args:
        path: the file.
        prediction_type: what the U-Net predicts, ``epsilon`` or ``v_prediction``; None finds out.
        ema: whether to take the U-Net's averaged weights from a file that has both.

    Raises:
        InputError: the file is damaged, of another kind of model, or lacks something.
    """
    file = _load(path)
    if not file.has(UNET):
        raise InputError(f"{path} holds no U-Net: give a file of the whole model")
    config, found = model_config(file, _stored_config(file), prediction_type)
    assert isinstance(config.vae, AutoencoderKLConfig)
    (text,) = config.text_encoders
    notes = [f"The U-Net predicts {config.schedule.prediction_type}: {found}."]
    if any(key.startswith(EMA) for key in file.tensors):
        which = "averaged (EMA)" if ema else "plain, not its averaged (EMA),"
        notes.append(f"The U-Net's {which} weights are read.")
    parts = (UNET, VAE, CLIP, OPEN_CLIP, EMA, "v_pred")
    if others := [key for key in file.tensors if not key.startswith(parts)]:
        notes.append(f"{count(others, len(file.tensors))} belong to no part of the model and are left out.")
    return Checkpoint(
        config,
        vae=_vae_state(file, config.vae) if file.has(VAE) else {},
        unet=_unet_state(file, config.unet, ema),
        text_encoders=[_text_state(file, text) if file.has(CLIP, OPEN_CLIP) else {}],
        # OpenCLIP's pads with "!": a folder of the same vocabulary whose special_tokens_map.json says so.
        tokenizers=[packaged("clip-tokenizer-2" if names.in_openclip_layout(text) else "clip-tokenizer")],
        notes=tuple(notes),
    )


def read_vae(path: Path) -> tuple[AutoencoderKLConfig, State]:
    """The autoencoder in a file of its own or of a whole model. Raises InputError as ``read`` does."""
    file = _load(path)
    stored = _stored_config(file)
    config = stored.vae if stored is not None else vae_config(file)
    assert isinstance(config, AutoencoderKLConfig)
    return config, _vae_state(file, config)


def _load(path: Path) -> File:
    """A file's tensors, mapped into memory. Raises InputError for a damaged file or one of another kind."""
    root, metadata = read_weights(path)
    step = root.get("global_step")
    found = families.kind(root)
    if found in families.KINDS:
        raise families.other(path, families.KINDS[found][1])
    named = {k: t for k, t in root.items() if isinstance(t, Tensor)}
    tensors = {families.whole(k): t.detach() for k, t in named.items()}
    if found is None:
        raise InputError(f"{path} has {len(tensors)} tensors, none of Stable Diffusion 1.x or 2.x")
    return File(path, {k: t for k, t in tensors.items() if not UNUSED.search(k)}, metadata, step)


def _stored_config(file: File) -> ModelConfig | None:
    """The configuration that ``write`` put into the metadata."""
    if CONFIG not in file.metadata:
        return None
    try:
        config = from_dict(ModelConfig, json_object("the text", file.metadata[CONFIG]))
    except InputError as error:
        raise InputError(f"the metadata {CONFIG} of {file.path} is damaged ({error})") from None
    vae, text = check_fits(config)
    blocks = config.unet.layers_per_block + vae.layers_per_block + text.num_hidden_layers
    if blocks > len(file.tensors):
        raise InputError(f"the metadata {CONFIG} of {file.path} is damaged: it has no {blocks} blocks")
    return config


# Tensors under our names.


def _unet_state(file: File, config: UNetConfig, ema: bool) -> State:
    module = _built(file, UNet, config)
    state = file.part(UNET)
    table = names.unet_blocks(config, gaps=has_gaps(state))
    if ema:
        averaged = file.part(EMA)
        if not averaged:
            raise InputError(f"{file.path} holds no averaged (EMA) weights: read its plain ones")
        published = (names.rename(ours, table) for ours in module.state_dict())
        flat_names = {name.replace(".", ""): name for name in published}
        state = {flat_names.get(flat, flat): tensor for flat, tensor in averaged.items()}
    return _fitted(file, "U-Net", module, table, state)


def _vae_state(file: File, config: AutoencoderKLConfig) -> State:
    module = _built(file, AutoencoderKL, config)
    return _fitted(file, "autoencoder", module, names.vae_blocks(config), file.part(VAE))


def _text_state(file: File, config: TextEncoderConfig) -> State:
    module = _built(file, TextEncoder, config)
    prefix = OPEN_CLIP if names.in_openclip_layout(config) else CLIP
    state = file.part(prefix)
    if names.in_openclip_layout(config):  # the last layer, which the U-Net does not read
        beyond = f"transformer.resblocks.{config.num_hidden_layers}."
        state = {k: t for k, t in _split(state).items() if not k.startswith(beyond)}
    return _fitted(file, "text encoder", module, names.text_blocks(config), state)


def _built(file: File, cls: Callable[[Any], nn.Module], config: object) -> nn.Module:
    with building(f"{file.path} describes a network that cannot be built: is it damaged?"):
        return cls(config)


def _fitted(file: File, part: str, module: nn.Module, table: dict[str, str], state: State) -> State:
    """The state under the module's names. Raises InputError where names or shapes are others."""
    wanted = {names.rename(ours, table): tensor for ours, tensor in module.state_dict().items()}
    # Attention is a 1x1 convolution there.
    found = {
        name: t.flatten(1) if t.ndim == 4 and name in wanted and wanted[name].ndim == 2 else t
        for name, t in state.items()
    }
    if reason := mismatch(wanted, found):
        raise InputError(f"{file.path} does not fit: of the {part}, {reason}")
    return {ours: found[names.rename(ours, table)] for ours in module.state_dict()}


def _split(state: State) -> State:
    """OpenCLIP's fused attention as three projections; the rows are queries, keys, values."""
    found = {}
    for name, tensor in state.items():
        stem, fused, leaf = name.partition(".attn.in_proj_")
        if fused and tensor.ndim > 0 and len(tensor) % 3 == 0:
            for letter, third in zip("qkv", tensor.chunk(3), strict=True):
                found[f"{stem}.attn.{letter}_proj.{leaf}"] = third
        else:
            found[name] = tensor
    return found
