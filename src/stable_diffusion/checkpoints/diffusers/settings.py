"""The settings in diffusers' JSON files, of each network both ways: ours for theirs, and theirs for ours."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from stable_diffusion.config import (
    TAESD,
    AutoencoderKLConfig,
    AutoencoderTinyConfig,
    ModelConfig,
    TextEncoderConfig,
    UNetConfig,
    from_dict,
    to_dict,
)
from stable_diffusion.errors import InputError, shown, unknown_name

VERSION = "0.42.1"
"""Of the diffusers whose form the settings have that we write."""

# What a configuration must say; for the rest diffusers' defaults hold where it is silent.
VAE_KEYS = ("in_channels", "latent_channels", "block_out_channels", "layers_per_block")
UNET_SAME = ("in_channels", "out_channels", "block_out_channels", "layers_per_block", "cross_attention_dim")
UNET_KEYS = (*UNET_SAME, "down_block_types", "attention_head_dim")

# What else has the same name there and here.
VAE_OPTIONAL = ("norm_num_groups", "scaling_factor")
UNET_OPTIONAL = ("norm_num_groups", "use_linear_projection", "upcast_attention", "time_cond_proj_dim")
TEXT_SAME = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("hidden_act", "max_position_embeddings", "layer_norm_eps"),
)

# What our networks are built for; another value is a network that they are not.
UNET_FIXED: dict[str, Any] = {
    **{"act_fn": "silu", "norm_eps": 1e-5, "flip_sin_to_cos": True, "freq_shift": 0},
    **{"center_input_sample": False, "downsample_padding": 1, "mid_block_scale_factor": 1},
    "transformer_layers_per_block": 1,
    **{"only_cross_attention": False, "dual_cross_attention": False, "resnet_time_scale_shift": "default"},
    **dict.fromkeys(("class_embed_type", "num_class_embeds", "addition_embed_type", "encoder_hid_dim")),
    **dict.fromkeys(("encoder_hid_dim_type", "time_embedding_act_fn")),
}
VAE_FIXED: dict[str, Any] = {
    **{"act_fn": "silu", "use_quant_conv": True, "use_post_quant_conv": True},
    **{"mid_block_add_attention": True},
    **dict.fromkeys(("shift_factor", "latents_mean", "latents_std")),
}
TINY_FIXED: dict[str, Any] = {
    **{"act_fn": "relu", "in_channels": 3, "upsampling_scaling_factor": 2, "scaling_factor": 1},
    "shift_factor": 0,
}
# Of an AutoencoderTiny, whose decoder's blocks are counted from the latents; ours from the pixels.
TINY_NAMES = {
    **{"latent_channels": "latent_channels", "encoder_block_out_channels": "block_out_channels"},
    **{"num_encoder_blocks": "encoder_blocks", "num_decoder_blocks": "decoder_blocks"},
}


def unet_config(settings: dict[str, Any]) -> UNetConfig:
    """Our configuration for a ``UNet2DConditionModel``'s ``config.json``."""
    _check_fixed("unet/config.json", settings, UNET_FIXED)
    widths, kinds = settings["block_out_channels"], settings["down_block_types"]
    if not isinstance(widths, list) or not isinstance(kinds, list) or len(widths) != len(kinds):
        raise InputError(
            f"unet/config.json: block_out_channels and down_block_types must be lists of one length,"
            f" got {shown(widths)} and {shown(kinds)}"
        )
    supported = ("CrossAttnDownBlock2D", "DownBlock2D")
    for kind in kinds:
        if kind not in supported:
            raise unknown_name("down block type", kind, supported)
    mirrored = [str(kind).replace("Down", "Up") for kind in reversed(kinds)]
    if settings.get("up_block_types", mirrored) != mirrored:
        raise InputError(
            f"unet/config.json: up_block_types must mirror down_block_types ({', '.join(mirrored)}),"
            f" got {shown(settings['up_block_types'])}"
        )
    heads = settings.get("num_attention_heads") or settings["attention_head_dim"]  # the published misnomer
    same = {key: settings[key] for key in UNET_SAME} | {
        key: settings[key] for key in UNET_OPTIONAL if settings.get(key) is not None
    }
    if "mid_block_type" in settings:  # null is a choice
        same["mid_block_type"] = settings["mid_block_type"]
    levels = [kind == "CrossAttnDownBlock2D" for kind in kinds]
    heads = heads if isinstance(heads, list) else [heads] * len(widths)
    return from_dict(UNetConfig, {**same, "attention_levels": levels, "num_attention_heads": heads})


def unet_settings(config: ModelConfig) -> dict[str, Any]:
    """The U-Net's ``config.json``: the inverse of ``unet_config``."""
    unet = config.unet
    down = ["CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in unet.attention_levels]
    heads = unet.num_attention_heads
    settings: dict[str, Any] = {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": VERSION,
        **{key: value for key, value in UNET_FIXED.items() if value is not None},
        "sample_size": config.sample_size // config.vae.factor,
        **_same(unet, (*UNET_SAME, *UNET_OPTIONAL, "mid_block_type")),
        "down_block_types": down,
        "up_block_types": [kind.replace("Down", "Up") for kind in reversed(down)],
        "attention_head_dim": heads[0] if len(set(heads)) == 1 else list(heads),  # the published misnomer
    }
    if unet.num_class_embeds is not None:
        settings["num_class_embeds"] = unet.num_class_embeds
    elif unet.pooled_projection_dim is not None:
        settings["class_embed_type"] = "projection"
        settings["projection_class_embeddings_input_dim"] = unet.pooled_projection_dim
    return settings


def autoencoder_config(settings: dict[str, Any]) -> AutoencoderKLConfig | AutoencoderTinyConfig:
    """Our configuration for the ``config.json`` of an ``AutoencoderKL`` or an ``AutoencoderTiny``."""
    if settings.get("_class_name") == "AutoencoderTiny":
        return tiny_config(settings)
    _check_fixed("vae/config.json", settings, VAE_FIXED)
    if missing := [key for key in VAE_KEYS if key not in settings]:
        raise InputError(f"vae/config.json does not say {', '.join(missing)}: copy or download it again")
    kept = {key: settings[key] for key in (*VAE_KEYS, *VAE_OPTIONAL) if key in settings}
    return from_dict(AutoencoderKLConfig, kept)


def tiny_config(settings: dict[str, Any]) -> AutoencoderTinyConfig:
    """Our configuration for an ``AutoencoderTiny``'s ``config.json``; TAESD's where it is silent."""
    _check_fixed("vae/config.json", settings, TINY_FIXED)
    found = {ours: settings[theirs] for theirs, ours in TINY_NAMES.items() if theirs in settings}
    config = from_dict(AutoencoderTinyConfig, found, base=TAESD)
    if "decoder_blocks" not in found:
        return config
    return replace(config, decoder_blocks=config.decoder_blocks[::-1])


def vae_settings(config: ModelConfig) -> dict[str, Any]:
    """The autoencoder's ``config.json``: the inverse of ``autoencoder_config``."""
    vae = config.vae
    if isinstance(vae, AutoencoderTinyConfig):
        ours = to_dict(vae)
        return {
            "_class_name": "AutoencoderTiny",
            "_diffusers_version": VERSION,
            **TINY_FIXED,
            **{theirs: ours[name] for theirs, name in TINY_NAMES.items()},
            "decoder_block_out_channels": ours["block_out_channels"],  # diffusers knows one width for all
            "num_decoder_blocks": ours["decoder_blocks"][::-1],
        }
    levels = len(vae.block_out_channels)
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": VERSION,
        "act_fn": "silu",
        **_same(vae, (*VAE_KEYS, *VAE_OPTIONAL)),
        "out_channels": vae.in_channels,
        "sample_size": config.sample_size,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def text_encoder_config(settings: dict[str, Any]) -> TextEncoderConfig:
    """Our configuration for a ``CLIPTextModel``'s ``config.json``."""
    same = {key: settings[key] for key in TEXT_SAME if key in settings}
    return from_dict(TextEncoderConfig, {**same, "context_length": settings["max_position_embeddings"]})


def text_settings(config: TextEncoderConfig) -> dict[str, Any]:
    """CLIP's ``config.json``: the inverse of ``text_encoder_config``. Layers that are skipped are not there."""
    ends: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        **_same(config, TEXT_SAME),
        "num_hidden_layers": config.num_hidden_layers - config.skip_last_layers,
        "projection_dim": config.hidden_size,
        **ends,  # as published: no token numbers
    }


def _same(config: object, keys: Collection[str]) -> dict[str, Any]:
    return {key: value for key, value in to_dict(config).items() if key in keys}


def _check_fixed(file: str, settings: dict[str, Any], fixed: dict[str, Any]) -> None:
    """Raises InputError for a setting of a network that ours cannot be."""
    for key, value in fixed.items():
        if settings.get(key, value) != value:
            raise InputError(
                f"{file}: {key} must be {value!r}, as in published models, got {shown(settings[key])}"
            )
