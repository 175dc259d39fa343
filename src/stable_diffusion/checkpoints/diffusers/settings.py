"""The settings in diffusers' JSON files, of each part both ways: ours for theirs, and theirs for ours."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

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
from stable_diffusion.diffusion.names import SAMPLERS, SPACINGS, sampler_name
from stable_diffusion.errors import InputError, shown, unknown_name

VERSION = "0.42.1"
"""Of the diffusers whose form the settings have that we write."""

# What a configuration must say; for the rest diffusers' defaults hold where it is silent.
VAE_KEYS = ("in_channels", "latent_channels", "block_out_channels", "layers_per_block")
UNET_SAME = ("in_channels", "out_channels", "block_out_channels", "layers_per_block", "cross_attention_dim")
UNET_KEYS = (*UNET_SAME, "down_block_types", "attention_head_dim")

# What else has the same name there and here.
VAE_OPTIONAL = ("norm_num_groups", "scaling_factor")
UNET_OPTIONAL = ("norm_num_groups", "use_linear_projection", "upcast_attention")
TEXT_SAME = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("hidden_act", "max_position_embeddings", "layer_norm_eps"),
)
# With diffusers' own defaults, which hold where a file is silent; that of set_alpha_to_one is the scheduler's.
SCHEDULE_SAME: dict[str, Any] = {
    **{"num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02, "steps_offset": 0},
    **{"prediction_type": "epsilon", "rescale_betas_zero_snr": False, "set_alpha_to_one": None},
}

# What our networks are built for; another value is a network that they are not.
UNET_FIXED: dict[str, Any] = {
    **{"act_fn": "silu", "norm_eps": 1e-5, "flip_sin_to_cos": True, "freq_shift": 0},
    **{"center_input_sample": False, "downsample_padding": 1, "mid_block_scale_factor": 1},
    **{"mid_block_type": "UNetMidBlock2DCrossAttn", "transformer_layers_per_block": 1},
    **{"only_cross_attention": False, "dual_cross_attention": False, "resnet_time_scale_shift": "default"},
    **dict.fromkeys(("class_embed_type", "num_class_embeds", "addition_embed_type", "encoder_hid_dim")),
    **dict.fromkeys(("time_cond_proj_dim", "encoder_hid_dim_type", "time_embedding_act_fn")),
}
VAE_FIXED: dict[str, Any] = {
    **{"act_fn": "silu", "use_quant_conv": True, "use_post_quant_conv": True},
    **{"mid_block_add_attention": True},
    **dict.fromkeys(("shift_factor", "latents_mean", "latents_std")),
}

BETA_SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}


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
        **_same(unet, (*UNET_SAME, *UNET_OPTIONAL)),
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


def autoencoder_config(settings: dict[str, Any]) -> AutoencoderKLConfig:
    """Our configuration for an ``AutoencoderKL``'s ``config.json``."""
    _check_fixed("vae/config.json", settings, VAE_FIXED)
    kept = {key: settings[key] for key in (*VAE_KEYS, *VAE_OPTIONAL) if key in settings}
    return from_dict(AutoencoderKLConfig, kept)


def vae_settings(config: ModelConfig) -> dict[str, Any]:
    """The KL autoencoder's ``config.json``: the inverse of ``autoencoder_config``."""
    vae = config.vae
    assert isinstance(vae, AutoencoderKLConfig)
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


def schedule_config(settings: dict[str, Any]) -> ScheduleConfig:
    """Our configuration of the forward process for a ``scheduler_config.json``."""
    found = SCHEDULE_SAME | {"set_alpha_to_one": settings["_class_name"] == "DDIMScheduler"}
    found |= {key: settings[key] for key in SCHEDULE_SAME if key in settings}
    if settings.get("use_flow_sigmas"):
        flow = {key: found[key] for key in ("num_train_timesteps", "prediction_type")}
        return from_dict(ScheduleConfig, {"kind": "flow", "shift": settings.get("flow_shift", 1.0), **flow})
    if settings.get("trained_betas") is not None:
        raise InputError("scheduler_config.json: trained_betas are not supported, a named beta_schedule is")
    beta_schedule = str(settings.get("beta_schedule", "linear"))
    if beta_schedule not in BETA_SCHEDULES:
        raise unknown_name("beta_schedule", beta_schedule, BETA_SCHEDULES)
    return from_dict(ScheduleConfig, {"kind": BETA_SCHEDULES[beta_schedule], **found})


def sampler_config(settings: dict[str, Any]) -> SamplerConfig:
    """The sampler that a ``scheduler_config.json`` names, with its spacing."""
    name = str(settings["_class_name"])
    rows = {ours: row for ours, row in SAMPLERS.items() if row.diffusers == name}
    if not rows:
        raise unknown_name("scheduler class", name, [row.diffusers for row in SAMPLERS.values()])
    if settings.get("use_flow_sigmas"):
        return SamplerConfig(name="euler" if settings.get("solver_order") == 1 else next(iter(rows)))
    sampler = max(rows, key=lambda ours: _says(settings, rows[ours].diffusers_settings))
    said = [ours for ours, row in SPACINGS.items() if row.diffusers and _says(settings, row.diffusers)]
    if not said and settings.get("timestep_spacing") is not None:
        raise unknown_name("timestep_spacing", settings["timestep_spacing"], SPACINGS)
    return SamplerConfig(name=sampler, spacing=said[-1] if said else None)  # Karras' levels before timesteps


def scheduler_settings(config: ModelConfig) -> dict[str, Any]:
    """The ``scheduler_config.json``: the inverse of ``schedule_config`` and ``sampler_config``."""
    schedule, sampler = config.schedule, config.sampler
    name = sampler_name(sampler.name)
    same = {"_diffusers_version": VERSION, **_same(schedule, SCHEDULE_SAME)}
    if schedule.kind == "flow":  # DPM-Solver++ of the first order is Euler's step
        return {
            "_class_name": "DPMSolverMultistepScheduler",
            **{key: same[key] for key in ("_diffusers_version", "num_train_timesteps", "prediction_type")},
            "flow_shift": schedule.shift,
            "steps_offset": 1,  # which its pipeline asks for
            "solver_order": 1 if name in ("euler", "ddim") else 2,
            "use_flow_sigmas": True,
        }
    if not schedule.rescale_betas_zero_snr:
        del same["rescale_betas_zero_snr"]
    beta_schedule = {ours: theirs for theirs, ours in BETA_SCHEDULES.items()}[schedule.kind]
    settings: dict[str, Any] = {
        "_class_name": SAMPLERS[name].diffusers,
        **SAMPLERS[name].diffusers_settings,
        **same,
        **{"beta_schedule": beta_schedule, "trained_betas": None},
        **{"clip_sample": False, "skip_prk_steps": True},
    }
    if sampler.spacing is not None:
        settings |= SPACINGS[sampler.spacing].diffusers
    if name == "ddpm" and sampler.variance == "large":
        settings["variance_type"] = "fixed_large"
    return settings


def _same(config: object, keys: Collection[str]) -> dict[str, Any]:
    return {key: value for key, value in to_dict(config).items() if key in keys}


def _check_fixed(file: str, settings: dict[str, Any], fixed: dict[str, Any]) -> None:
    """Raises InputError for a setting of a network that ours cannot be."""
    for key, value in fixed.items():
        if settings.get(key, value) != value:
            raise InputError(
                f"{file}: {key} must be {value!r}, as in published models, got {shown(settings[key])}"
            )


def _says(settings: dict[str, Any], wanted: Mapping[str, Any]) -> int:
    """How many settings are as wanted; 0 unless all are."""
    return len(wanted) if all(settings.get(key) == value for key, value in wanted.items()) else 0
