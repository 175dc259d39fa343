"""Diffusers' folders of Stable Diffusion 1.x and 2.x, as published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stable_diffusion.checkpoints.checkpoint import Checkpoint, State, read_tensors, text_state
from stable_diffusion.config import (
    AutoencoderKLConfig,
    ModelConfig,
    SamplerConfig,
    ScheduleConfig,
    TextEncoderConfig,
    UNetConfig,
    from_dict,
    to_dict,
)
from stable_diffusion.diffusion.samplers import ALIASES
from stable_diffusion.errors import InputError, unknown_name

# The autoencoder's attention in files of before 2023, and today's names.
VAE_ATTENTION_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

# What a configuration must say; for the rest diffusers' defaults hold where it is silent.
VAE_KEYS = ("in_channels", "latent_channels", "block_out_channels", "layers_per_block")
UNET_KEYS = (
    *("in_channels", "out_channels", "block_out_channels", "down_block_types"),
    *("layers_per_block", "cross_attention_dim", "attention_head_dim"),
)

BETA_SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}


def is_diffusers(folder: Path) -> bool:
    """Whether a folder is a diffusers pipeline."""
    return (folder / "model_index.json").is_file()


def read(folder: Path) -> Checkpoint:
    """The checkpoint in a diffusers folder.

    Raises:
        InputError: a file is missing or damaged, or the folder holds another kind of model.
    """
    text = text_encoder_config(_json(folder / "text_encoder" / "config.json", "max_position_embeddings"))
    schedule = _json(folder / "scheduler" / "scheduler_config.json", "_class_name")
    unet_settings = _json(folder / "unet" / "config.json", *UNET_KEYS)
    vae = autoencoder_config(_json(folder / "vae" / "config.json", *VAE_KEYS))
    config = ModelConfig(
        name=folder.resolve().name,
        sample_size=unet_settings.get("sample_size", 64) * vae.factor,
        vae=vae,
        unet=unet_config(unet_settings),
        text_encoders=(text,),
        schedule=schedule_config(schedule),
        sampler=sampler_config(schedule),
    )
    return Checkpoint(
        config,
        vae=vae_state(_weights(folder / "vae", "diffusion_pytorch_model")),
        unet=_weights(folder / "unet", "diffusion_pytorch_model"),
        text_encoders=[text_state(_weights(folder / "text_encoder", "model"), text)],
        tokenizers=[folder / "tokenizer"],
    )


def unet_config(settings: dict[str, Any]) -> UNetConfig:
    """Our configuration for a ``UNet2DConditionModel``'s ``config.json``."""
    widths = settings["block_out_channels"]
    kinds = settings["down_block_types"]
    supported = ("CrossAttnDownBlock2D", "DownBlock2D")
    for kind in kinds:
        if kind not in supported:
            raise unknown_name("down block type", kind, supported)
    heads = settings.get("num_attention_heads") or settings["attention_head_dim"]  # the published misnomer
    return UNetConfig(
        in_channels=settings["in_channels"],
        out_channels=settings["out_channels"],
        block_out_channels=tuple(widths),
        layers_per_block=settings["layers_per_block"],
        attention_levels=tuple(kind == "CrossAttnDownBlock2D" for kind in kinds),
        num_attention_heads=tuple(heads) if isinstance(heads, list) else (heads,) * len(widths),
        cross_attention_dim=settings["cross_attention_dim"],
        norm_num_groups=settings.get("norm_num_groups", 32),
        use_linear_projection=settings.get("use_linear_projection") or False,
        upcast_attention=settings.get("upcast_attention") or False,
    )


def autoencoder_config(settings: dict[str, Any]) -> AutoencoderKLConfig:
    """Our configuration for an ``AutoencoderKL``'s ``config.json``."""
    return AutoencoderKLConfig(
        in_channels=settings["in_channels"],
        latent_channels=settings["latent_channels"],
        block_out_channels=tuple(settings["block_out_channels"]),
        layers_per_block=settings["layers_per_block"],
        norm_num_groups=settings.get("norm_num_groups", 32),
        scaling_factor=settings.get("scaling_factor", 0.18215),
    )


def text_encoder_config(settings: dict[str, Any]) -> TextEncoderConfig:
    """Our configuration for a ``CLIPTextModel``'s ``config.json``."""
    fields = to_dict(TextEncoderConfig())
    same = {key: settings[key] for key in fields.keys() & settings.keys()}
    return from_dict(TextEncoderConfig, {**same, "context_length": settings["max_position_embeddings"]})


def schedule_config(settings: dict[str, Any]) -> ScheduleConfig:
    """Our configuration of the forward process for a ``scheduler_config.json``."""
    beta_schedule = settings.get("beta_schedule", "linear")
    if beta_schedule not in BETA_SCHEDULES:
        raise unknown_name("beta_schedule", beta_schedule, BETA_SCHEDULES)
    # Diffusers' own defaults where the file is silent; that of set_alpha_to_one depends on the scheduler.
    alpha_to_one = settings.get("set_alpha_to_one", settings["_class_name"] == "DDIMScheduler")
    return from_dict(
        ScheduleConfig,
        {
            "kind": BETA_SCHEDULES[beta_schedule],
            "num_train_timesteps": settings.get("num_train_timesteps", 1000),
            "beta_start": settings.get("beta_start", 0.0001),
            "beta_end": settings.get("beta_end", 0.02),
            "rescale_betas_zero_snr": settings.get("rescale_betas_zero_snr", False),
            "prediction_type": settings.get("prediction_type", "epsilon"),
            "steps_offset": settings.get("steps_offset", 0),
            "set_alpha_to_one": alpha_to_one,
        },
    )


def sampler_config(settings: dict[str, Any]) -> SamplerConfig:
    """The sampler that a ``scheduler_config.json`` names, with its spacing."""
    name = settings["_class_name"]
    if name.lower() not in ALIASES:
        raise unknown_name(
            "scheduler class", name, [alias for alias in ALIASES if alias.endswith("scheduler")]
        )
    spacing = "karras" if settings.get("use_karras_sigmas") else settings.get("timestep_spacing")
    sampler = ALIASES[name.lower()]
    if sampler == "dpmpp_2m" and settings.get("algorithm_type") == "sde-dpmsolver++":
        sampler = "dpmpp_2m_sde"
    return from_dict(SamplerConfig, {"name": sampler, "spacing": spacing})


def vae_state(published: State) -> State:
    """A published autoencoder's tensors under today's names, the attention's weights as matrices."""
    state = {}
    for name, tensor in published.items():
        parent, _, leaf = name.rpartition(".")
        stem, _, last = parent.rpartition(".")
        if stem.endswith("mid_block.attentions.0") and last in VAE_ATTENTION_NAMES:
            name = f"{stem}.{VAE_ATTENTION_NAMES[last]}.{leaf}"
        if ".attentions." in name and tensor.ndim == 4:
            tensor = tensor[:, :, 0, 0]
        state[name] = tensor
    return state


def _weights(folder: Path, stem: str) -> State:
    """The safetensors file of a part: the plain one, or else the fp16 variant."""
    for name in (f"{stem}.safetensors", f"{stem}.fp16.safetensors"):
        if (folder / name).is_file():
            return read_tensors(folder / name)
    raise InputError(f"{folder} has no {stem}.safetensors: a diffusers folder needs it")


def _json(path: Path, *needed: str) -> dict[str, Any]:
    """The settings in a file, which must have those that are needed."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: a diffusers folder of Stable Diffusion needs it") from None
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}): copy or download it again") from None
    if not isinstance(settings, dict):
        raise InputError(f"{path} must hold a JSON object, got a {type(settings).__name__}")
    if missing := [key for key in needed if key not in settings]:
        raise InputError(
            f"{path} does not say {', '.join(missing)}: it is no configuration of Stable Diffusion 1.x or 2.x"
        )
    return settings
