"""Diffusers' folders of Stable Diffusion 1.x and 2.x, as published."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from stable_diffusion.checkpoints.checkpoint import (
    Checkpoint,
    State,
    read_tensors,
    text_state,
)
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
from stable_diffusion.diffusion.names import SAMPLERS, SPACINGS
from stable_diffusion.errors import InputError, unknown_name

# The autoencoder's attention in files of before 2023, and today's names.
VAE_ATTENTION_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

# What a configuration must say; for the rest diffusers' defaults hold where it is silent.
VAE_KEYS = ("in_channels", "latent_channels", "block_out_channels", "layers_per_block")
UNET_KEYS = (
    *("in_channels", "out_channels", "block_out_channels", "down_block_types"),
    *("layers_per_block", "cross_attention_dim", "attention_head_dim"),
)

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
    **{
        "act_fn": "silu",
        "use_quant_conv": True,
        "use_post_quant_conv": True,
        "mid_block_add_attention": True,
    },
    **dict.fromkeys(("shift_factor", "latents_mean", "latents_std")),
}

BETA_SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}

PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline",
             "StableDiffusionInpaintPipelineLegacy")  # fmt: skip
OTHER_FAMILIES = {
    **{"StableDiffusionXL": "SDXL", "StableDiffusion3": "Stable Diffusion 3", "Flux": "Flux"},
    **{"StableCascade": "Stable Cascade", "PixArt": "PixArt", "Kandinsky": "Kandinsky"},
}
LEFT_ASIDE = ("safety_checker", "feature_extractor", "image_encoder")

WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
"""Each part's file of weights, without suffix; a text encoder's .bin is called pytorch_model."""


def is_diffusers(folder: Path) -> bool:
    """Whether a folder is a diffusers pipeline."""
    return (folder / "model_index.json").is_file()


def read(folder: Path, *, variant: str | None = None) -> Checkpoint:
    """The checkpoint in a diffusers folder.

    Args:
        folder: the pipeline.
        variant: files to prefer, such as ``fp16`` or ``non_ema``; None takes the plain ones, else fp16's.

    Raises:
        InputError: a file is missing or damaged, the folder holds another kind of model, or no part has the
            variant.
    """
    aside = _left_aside(folder)
    text = text_encoder_config(_json(folder / "text_encoder" / "config.json", "max_position_embeddings"))
    schedule = _json(folder / "scheduler" / "scheduler_config.json", "_class_name")
    unet_settings = _json(folder / "unet" / "config.json", *UNET_KEYS)
    vae = autoencoder_config(_json(folder / "vae" / "config.json", *VAE_KEYS))
    config = ModelConfig(
        name=folder.resolve().name,
        sample_size=_number(unet_settings, "sample_size", 64) * vae.factor,
        vae=vae,
        unet=unet_config(unet_settings),
        text_encoders=(text,),
        schedule=schedule_config(schedule),
        sampler=sampler_config(schedule),
    )
    said = "says so" if "prediction_type" in schedule else "is silent, which is diffusers' word for it"
    notes = [f"The U-Net predicts {config.schedule.prediction_type}: scheduler/scheduler_config.json {said}."]
    if aside:
        notes.append(f"Left aside: {' and '.join(aside)}.")
    clips = schedule["_class_name"] in ("DDIMScheduler", "DDPMScheduler")
    if schedule.get("clip_sample", clips) or schedule.get("thresholding"):
        notes.append("Left aside: the scheduler's clipping of what it sees in the noise (clip_sample).")
    states = {part: _weights(folder / part, stem, variant) for part, stem in WEIGHTS.items()}
    if variant is not None and not any(has_variant(_names(folder / part), variant) for part in WEIGHTS):
        raise InputError(f"{folder} has no files of the variant {variant!r}: {_variants_there(folder)}")
    return Checkpoint(
        config,
        vae=vae_state(states["vae"]),
        unet=states["unet"],
        text_encoders=[text_state(states["text_encoder"], text)],
        tokenizers=[folder / "tokenizer"],
        notes=tuple(notes),
    )


def _left_aside(folder: Path) -> list[str]:
    """The parts that are not read. Raises InputError for pipelines of other families."""
    index = _json(folder / "model_index.json")
    name = str(index.get("_class_name", PIPELINES[0]))
    for prefix, family in OTHER_FAMILIES.items():
        if name.startswith(prefix):
            raise InputError(
                f"{folder} is a {family} model ({name}): not supported, Stable Diffusion 1.x and 2.x are"
            )
    for part in ("text_encoder_2", "transformer", "prior"):
        if _is_there(index, part) or (folder / part).is_dir():
            raise InputError(
                f"{folder} has a {part}, as SDXL, Stable Diffusion 3 and Flux have it: not supported, Stable"
                " Diffusion 1.x and 2.x are"
            )
    if name not in PIPELINES:
        raise unknown_name("pipeline class", name, PIPELINES)
    return [part for part in LEFT_ASIDE if _is_there(index, part)]


def _is_there(index: dict[str, Any], part: str) -> bool:
    entry = index.get(part)
    return isinstance(entry, list) and any(name is not None for name in entry)


def unet_config(settings: dict[str, Any]) -> UNetConfig:
    """Our configuration for a ``UNet2DConditionModel``'s ``config.json``."""
    _check_fixed("unet/config.json", settings, UNET_FIXED)
    widths, kinds = settings["block_out_channels"], settings["down_block_types"]
    if not isinstance(widths, list) or not isinstance(kinds, list) or len(widths) != len(kinds):
        raise InputError(
            f"unet/config.json: block_out_channels and down_block_types must be lists of one length, got {widths!r}"
            f" and {kinds!r}"
        )
    supported = ("CrossAttnDownBlock2D", "DownBlock2D")
    for kind in kinds:
        if kind not in supported:
            raise unknown_name("down block type", kind, supported)
    mirrored = [str(kind).replace("Down", "Up") for kind in reversed(kinds)]
    if settings.get("up_block_types", mirrored) != mirrored:
        raise InputError(
            f"unet/config.json: up_block_types must mirror down_block_types ({', '.join(mirrored)}),"
            f" got {settings['up_block_types']!r}"
        )
    heads = settings.get("num_attention_heads") or settings["attention_head_dim"]  # the published misnomer
    return from_dict(
        UNetConfig,
        {
            "in_channels": settings["in_channels"],
            "out_channels": settings["out_channels"],
            "block_out_channels": widths,
            "layers_per_block": settings["layers_per_block"],
            "attention_levels": [kind == "CrossAttnDownBlock2D" for kind in kinds],
            "num_attention_heads": heads if isinstance(heads, list) else [heads] * len(widths),
            "cross_attention_dim": settings["cross_attention_dim"],
            "norm_num_groups": settings.get("norm_num_groups", 32),
            "use_linear_projection": settings.get("use_linear_projection") or False,
            "upcast_attention": settings.get("upcast_attention") or False,
        },
    )


def _check_fixed(file: str, settings: dict[str, Any], fixed: dict[str, Any]) -> None:
    """Raises InputError for a setting of a network that ours cannot be."""
    for key, value in fixed.items():
        if settings.get(key, value) != value:
            raise InputError(
                f"{file}: {key} must be {value!r}, as in Stable Diffusion 1.x and 2.x, got {settings[key]!r}"
            )


def _number(settings: dict[str, Any], key: str, default: int) -> int:
    value = settings.get(key, default)
    if type(value) is not int or value < 1:
        raise InputError(f"{key} must be a whole number, at least 1, got {value!r}")
    return value


def autoencoder_config(settings: dict[str, Any]) -> AutoencoderKLConfig:
    """Our configuration for an ``AutoencoderKL``'s ``config.json``."""
    _check_fixed("vae/config.json", settings, VAE_FIXED)
    kept = (*VAE_KEYS, "norm_num_groups", "scaling_factor")
    return from_dict(AutoencoderKLConfig, {key: settings[key] for key in kept if key in settings})


def text_encoder_config(settings: dict[str, Any]) -> TextEncoderConfig:
    """Our configuration for a ``CLIPTextModel``'s ``config.json``."""
    fields = to_dict(TextEncoderConfig())
    # Of theirs only: these names are ours, and no file of theirs means them.
    own = ("architecture", "context_length", "skip_last_layers", "trainable", "packaged")
    same = {key: settings[key] for key in fields.keys() & settings.keys() if key not in own}
    return from_dict(TextEncoderConfig, {**same, "context_length": settings["max_position_embeddings"]})


def schedule_config(settings: dict[str, Any]) -> ScheduleConfig:
    """Our configuration of the forward process for a ``scheduler_config.json``."""
    if settings.get("use_flow_sigmas"):
        return from_dict(
            ScheduleConfig,
            {
                "kind": "flow",
                "num_train_timesteps": settings.get("num_train_timesteps", 1000),
                "shift": settings.get("flow_shift", 1.0),
                "prediction_type": settings.get("prediction_type", "epsilon"),
            },
        )
    if settings.get("trained_betas") is not None:
        raise InputError("scheduler_config.json: trained_betas are not supported, a named beta_schedule is")
    beta_schedule = str(settings.get("beta_schedule", "linear"))
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


def _says(settings: dict[str, Any], wanted: Mapping[str, Any]) -> int:
    """How many settings are as wanted; 0 unless all are."""
    return len(wanted) if all(settings.get(key) == value for key, value in wanted.items()) else 0


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


def choose_weights(names: Collection[str], stem: str, variant: str | None = None) -> list[str]:
    """The files, of those in a part's folder, that hold its weights: one, or an index with its shards; or none.

    The variant where the part has it, else the plain files, else fp16's; safetensors before pickles.
    """
    for infix in dict.fromkeys((f".{variant}" if variant else "", "", ".fp16")):
        for name, suffix in ((stem, "safetensors"), ("pytorch_model" if stem == "model" else stem, "bin")):
            if f"{name}{infix}.{suffix}" in names:
                return [f"{name}{infix}.{suffix}"]
            for index in (f"{name}.{suffix}.index{infix}.json", f"{name}{infix}.{suffix}.index.json"):
                if index in names:
                    shard = re.compile(rf"{re.escape(name + infix)}-\d+-of-\d+(\.\w+)?\.{suffix}")
                    return [index, *sorted(filter(shard.fullmatch, names))]
    return []


def has_variant(names: Collection[str], variant: str) -> bool:
    """Whether one of the files in a part's folder is of that variant."""
    return any(f".{variant}" in name for name in names)


def _weights(folder: Path, stem: str, variant: str | None) -> State:
    """The tensors of a part."""
    names = _names(folder)
    chosen = choose_weights(names, stem, variant)
    if not chosen:
        raise InputError(
            f"{folder} has no weights, neither {stem}.safetensors nor a .bin: {_variants_there(folder.parent)}"
        )
    if not chosen[0].endswith(".json"):
        return _tensors(folder / chosen[0])
    places = _json(folder / chosen[0], "weight_map")["weight_map"]
    if not isinstance(places, dict) or not all(
        isinstance(file, str) and file and Path(file).name == file and "\\" not in file
        for file in places.values()
    ):
        raise InputError(f"{folder / chosen[0]}: weight_map must give the file of each tensor beside it")
    state: State = {}
    for file in sorted(set(places.values())):
        state |= _tensors(folder / file)
    if absent := sorted(places.keys() - state.keys()):
        raise InputError(
            f"{folder}: {len(absent)} of {len(places)} tensors are in no shard ({', '.join(absent[:3])}):"
            " copy or download it again"
        )
    return state


def _tensors(path: Path) -> State:
    """The tensors of a safetensors file or of a pickle."""
    if path.suffix != ".bin":
        return read_tensors(path)
    if not path.is_file():
        raise InputError(f"{path} does not exist: a model folder needs it")
    from stable_diffusion.checkpoints import pickles

    content = pickles.read(path)
    if strange := sorted(str(name) for name, value in content.items() if not isinstance(value, torch.Tensor)):
        raise InputError(f"{path} holds what is no tensor ({', '.join(strange[:3])}): no weights of a part")
    return content


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def _variants_there(folder: Path) -> str:
    """What to do where a folder lacks files: take a variant that it has, or the whole folder."""
    pattern = re.compile(r"(?:diffusion_pytorch_model|model|pytorch_model)\.(\w+)\.(?:safetensors|bin)")
    files = (match for part in WEIGHTS for match in map(pattern.fullmatch, _names(folder / part)))
    there = sorted({match[1] for match in files if match})
    return f"the variants there are {', '.join(there)}" if there else "copy or download the folder whole"


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
