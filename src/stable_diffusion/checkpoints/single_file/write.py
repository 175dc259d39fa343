"""Writing a single file."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from stable_diffusion.checkpoints import families
from stable_diffusion.checkpoints.checkpoint import Checkpoint
from stable_diffusion.checkpoints.families import CLIP, OPEN_CLIP, UNET, VAE
from stable_diffusion.checkpoints.files import State, write_tensors
from stable_diffusion.checkpoints.single_file import names
from stable_diffusion.config import AutoencoderKLConfig, ModelConfig, TextEncoderConfig, to_dict
from stable_diffusion.errors import InputError

CONFIG = "mini_stable_diffusion.config"
"""Where the header's metadata has the configuration, since shapes do not tell all of it."""


def write(path: Path, checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> None:
    """Writes a ``.safetensors`` file of the whole model beside its final name, then puts it in place.

    Args:
        path: the file, a name that nothing has.
        checkpoint: what to write.
        dtype: number format of the file; None keeps the tensors'.

    Raises:
        InputError: the layout has no place for such a model, or the file cannot be written.
    """
    tensors = to_single(checkpoint.config, checkpoint.unet, checkpoint.vae, checkpoint.text_encoders[:1])
    write_tensors(path, tensors, dtype, _metadata(checkpoint.config), new=True)


def to_single(config: ModelConfig, unet: State, vae: State, texts: list[State]) -> State:
    """The parts' tensors under the names of a single file. Raises InputError where they have no place there."""
    vae_config, text_config = check_fits(config)
    openclip = names.in_openclip_layout(text_config)
    tensors = names.renamed(unet, names.unet_blocks(config.unet), UNET) | names.renamed(
        vae, names.vae_blocks(vae_config), VAE
    )
    for name, tensor in tensors.items():
        if ".mid.attn_1." in name and tensor.ndim == 2:
            tensors[name] = tensor[:, :, None, None]
    text = names.renamed(texts[0], names.text_blocks(text_config), "")
    if openclip:
        text = _unused_head(_fused(text), text_config.num_hidden_layers - text_config.skip_last_layers)
    else:
        text["embeddings.position_ids"] = torch.arange(text_config.max_position_embeddings)[None]
    return tensors | {(OPEN_CLIP if openclip else CLIP) + name: tensor for name, tensor in text.items()}


def check_fits(config: ModelConfig) -> tuple[AutoencoderKLConfig, TextEncoderConfig]:
    """The configurations of autoencoder and text encoder. Raises InputError where the layout has no place for them."""
    reason, vae, text = families.misfit(config), config.vae, config.text_encoders[:1]
    process = (config.schedule.kind, config.schedule.prediction_type)
    if reason is None and not isinstance(vae, AutoencoderKLConfig):
        reason = "the layout has no names for its light autoencoder"
    if reason is None and isinstance(vae, AutoencoderKLConfig):
        checks = {
            "the layout has no names for a U-Net that reads its guidance": config.unet.time_cond_proj_dim
            is None,
            "its autoencoder's scaling factor is not 0.18215": vae.scaling_factor == 0.18215,
            "its text encoder has another vocabulary": text[0].vocab_size == 49408,
            "its U-Net reads other than the text encoder's usual layer": (
                text[0].skip_last_layers <= names.in_openclip_layout(text[0])
            ),
            "it is trained for another process than Stable Diffusion's, with eps or v": process
            in (("scaled_linear", "epsilon"), ("scaled_linear", "v_prediction")),
        }
        reason = next((problem for problem, fine in checks.items() if not fine), None)
    if reason:
        raise InputError(f"a single file cannot hold the model {config.name!r}: {reason}")
    assert isinstance(vae, AutoencoderKLConfig)
    return vae, text[0]


def _fused(state: State) -> State:
    found = dict(state)
    for name in state:
        if ".attn.q_proj." in name:
            thirds = [found.pop(name.replace("q_proj", f"{letter}_proj")) for letter in "qkv"]
            found[name.replace("q_proj.", "in_proj_")] = torch.cat(thirds)
    return found


def _unused_head(state: State, layers: int) -> State:
    """The state with what files of 2.x have beyond the layers that are read, made anew as kohya's scripts do."""
    last, beyond = f"transformer.resblocks.{layers - 1}.", f"transformer.resblocks.{layers}."
    copies = {name.replace(last, beyond): t.clone() for name, t in state.items() if name.startswith(last)}
    width, dtype = state["token_embedding.weight"].shape[1], state["token_embedding.weight"].dtype
    head = {
        "text_projection": torch.ones(width, width, dtype=dtype),
        "logit_scale": torch.ones((), dtype=dtype),
    }
    return copies | head | state


def _metadata(config: ModelConfig) -> dict[str, str]:
    """The header's metadata: modelspec's keys, and the configuration."""
    v = config.schedule.prediction_type == "v_prediction"
    openclip = names.in_openclip_layout(config.text_encoders[0])
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"stable-diffusion-v{('2-768-v' if v else '2-512') if openclip else 1}",
        "modelspec.title": config.name,
        "modelspec.resolution": f"{config.sample_size}x{config.sample_size}",
        "modelspec.prediction_type": "v" if v else "epsilon",
        CONFIG: json.dumps(to_dict(config)),
    }
