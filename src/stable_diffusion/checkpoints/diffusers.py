"""Diffusers' folders of Stable Diffusion 1.x and 2.x, as published: in and out."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from stable_diffusion.checkpoints import native
from stable_diffusion.checkpoints.checkpoint import (
    Checkpoint,
    State,
    published_text_state,
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

SCHEDULERS = {
    "ddpm": "DDPMScheduler",
    "ddim": "DDIMScheduler",
    "pndm": "PNDMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "dpmpp_2m_sde": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "lcm": "LCMScheduler",
}
DIFFUSERS_VERSION = "0.42.1"  # whose form the folders that we write have

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
    if name.lower() not in ALIASES:
        raise unknown_name(
            "scheduler class", name, [alias for alias in ALIASES if alias.endswith("scheduler")]
        )
    spacing = "karras" if settings.get("use_karras_sigmas") else settings.get("timestep_spacing")
    sampler = ALIASES[name.lower()]
    if settings.get("use_flow_sigmas"):
        return SamplerConfig(name="euler" if settings.get("solver_order") == 1 else sampler)
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


# Out


def misfit(config: ModelConfig) -> str | None:
    """Why ``StableDiffusionPipeline`` cannot hold a model, as the end of a sentence; None where it can."""
    if not isinstance(config.vae, AutoencoderKLConfig):
        return "its light autoencoder is none of diffusers'"
    if config.vae.codebook_size is not None:
        return "its autoencoder has a codebook"
    if len(config.text_encoders) != 1:
        return f"it has {len(config.text_encoders) or 'no'} text encoders, and the pipeline has one"
    (text,) = config.text_encoders
    if text.architecture != "clip":
        return "its text encoder is BERT, and the pipeline's is CLIP"
    if text.hidden_size != config.unet.cross_attention_dim:
        return "its text tokens are projected"
    if config.unet.pooled_projection_dim is not None or config.unet.num_class_embeds is not None:
        return "its U-Net reads more than the text's tokens"
    if (config.schedule.kind == "flow") != (config.schedule.prediction_type == "flow_prediction"):
        return f"no scheduler of diffusers has {config.schedule.prediction_type} with {config.schedule.kind}"
    return None


def write(
    folder: Path, checkpoint: Checkpoint, tokenizer_files: list[list[Path]], dtype: torch.dtype | None = None
) -> tuple[str, ...]:
    """Writes a diffusers folder beside its final name, then puts it in place.

    Where the pipeline cannot hold the model, its scheduler and of U-Net and autoencoder what diffusers has are
    written alone.

    Args:
        folder: a name that nothing has, or an empty folder.
        checkpoint: what to write.
        tokenizer_files: the files of each text encoder's tokenizer.
        dtype: number format of the files; None keeps the tensors'.

    Returns:
        What was not written or is not the same there, in sentences for the user.

    Raises:
        InputError: there is something at `folder`, or diffusers has no place for any part.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"{folder} exists: choose another name")
    config = checkpoint.config
    reason = misfit(config)
    kl = isinstance(config.vae, AutoencoderKLConfig) and config.vae.codebook_size is None
    text = config.unet.cross_attention_dim is not None  # diffusers' U-Net cannot be without
    written = [part for part, is_there in (("unet", text), ("vae", kl)) if is_there]
    if not written:
        raise InputError(f"diffusers has no place for any part of {config.name!r}: {reason}")
    with native.beside(folder) as building:
        if text:
            _write_part(building / "unet", unet_settings(config), checkpoint.unet, dtype)
        _write_json(building / "scheduler" / "scheduler_config.json", scheduler_settings(config))
        if kl:
            _write_part(building / "vae", vae_settings(config), checkpoint.vae, dtype)
        if reason is None:
            kept = _without_skipped_layers(checkpoint.text_encoders[0], config.text_encoders[0])
            state = published_text_state(kept, config.text_encoders[0])
            native.write_tensors(building / "text_encoder" / "model.safetensors", state, dtype)
            settings = text_settings(config.text_encoders[0])
            _write_json(building / "text_encoder" / "config.json", settings)
            _write_tokenizer(building / "tokenizer", tokenizer_files[0], config.text_encoders[0])
            _write_json(building / "model_index.json", pipeline_index(config))
    notes = []
    if reason is not None:
        notes.append(
            f"The model {config.name!r} is no StableDiffusionPipeline, because {reason}: {folder} has its"
            f" {', '.join(written)} and scheduler alone."
        )
    elif config.schedule.kind != "flow" and config.schedule.steps_offset != 1:
        notes.append(
            "Diffusers' pipeline sets steps_offset to 1: with leading timesteps its pictures differ."
        )
    if config.schedule.kind == "flow":
        notes.append(
            "Diffusers walks a rectified flow from 0.999 on and cuts times to whole numbers: its pictures differ a"
            " little."
        )
    return tuple(notes)


def pipeline_index(config: ModelConfig) -> dict[str, Any]:
    """The ``model_index.json``."""
    inpaints = config.unet.in_channels == 2 * config.vae.latent_channels + 1
    return {
        "_class_name": "StableDiffusionInpaintPipeline" if inpaints else "StableDiffusionPipeline",
        "_diffusers_version": DIFFUSERS_VERSION,
        **{part: [None, None] for part in LEFT_ASIDE},
        "requires_safety_checker": False,
        "scheduler": ["diffusers", scheduler_settings(config)["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def unet_settings(config: ModelConfig) -> dict[str, Any]:
    """The U-Net's ``config.json``: the inverse of ``unet_config``."""
    unet = config.unet
    down = ["CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in unet.attention_levels]
    heads = unet.num_attention_heads
    settings: dict[str, Any] = {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": DIFFUSERS_VERSION,
        **{key: value for key, value in UNET_FIXED.items() if value is not None},
        "sample_size": config.sample_size // config.vae.factor,
        "in_channels": unet.in_channels,
        "out_channels": unet.out_channels,
        "block_out_channels": list(unet.block_out_channels),
        "down_block_types": down,
        "up_block_types": [kind.replace("Down", "Up") for kind in reversed(down)],
        "layers_per_block": unet.layers_per_block,
        "attention_head_dim": heads[0] if len(set(heads)) == 1 else list(heads),  # the published misnomer
        "cross_attention_dim": unet.cross_attention_dim,
        "norm_num_groups": unet.norm_num_groups,
        "use_linear_projection": unet.use_linear_projection,
        "upcast_attention": unet.upcast_attention,
    }
    if unet.num_class_embeds is not None:
        settings["num_class_embeds"] = unet.num_class_embeds
    elif unet.pooled_projection_dim is not None:
        settings["class_embed_type"] = "projection"
        settings["projection_class_embeddings_input_dim"] = unet.pooled_projection_dim
    return settings


def vae_settings(config: ModelConfig) -> dict[str, Any]:
    """The KL autoencoder's ``config.json``: the inverse of ``autoencoder_config``."""
    vae = config.vae
    assert isinstance(vae, AutoencoderKLConfig)
    levels = len(vae.block_out_channels)
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": DIFFUSERS_VERSION,
        "act_fn": "silu",
        "block_out_channels": list(vae.block_out_channels),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "in_channels": vae.in_channels,
        "latent_channels": vae.latent_channels,
        "layers_per_block": vae.layers_per_block,
        "norm_num_groups": vae.norm_num_groups,
        "out_channels": vae.in_channels,
        "sample_size": config.sample_size,
        "scaling_factor": vae.scaling_factor,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def text_settings(config: TextEncoderConfig) -> dict[str, Any]:
    """CLIP's ``config.json``: the inverse of ``text_encoder_config``. Layers that are skipped are not there."""
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "hidden_act")
    ends: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        **{key: getattr(config, key) for key in (*same, "max_position_embeddings", "layer_norm_eps")},
        "num_hidden_layers": config.num_hidden_layers - config.skip_last_layers,
        "projection_dim": config.hidden_size,
        **ends,  # as published: no token numbers
    }


def scheduler_settings(config: ModelConfig) -> dict[str, Any]:
    """The ``scheduler_config.json``: the inverse of ``schedule_config`` and ``sampler_config``."""
    schedule, sampler = config.schedule, config.sampler
    name = ALIASES.get(sampler.name.lower(), sampler.name.lower())
    common: dict[str, Any] = {
        "_diffusers_version": DIFFUSERS_VERSION,
        "num_train_timesteps": schedule.num_train_timesteps,
        "prediction_type": schedule.prediction_type,
    }
    if schedule.kind == "flow":  # DPM-Solver++ of the first order is Euler's step
        return {
            "_class_name": "DPMSolverMultistepScheduler",
            **common,
            "flow_shift": schedule.shift,
            "steps_offset": 1,  # which its pipeline asks for
            "solver_order": 1 if name in ("euler", "ddim") else 2,
            "use_flow_sigmas": True,
        }
    settings: dict[str, Any] = {
        "_class_name": SCHEDULERS[name],
        **common,
        "beta_end": schedule.beta_end,
        "beta_schedule": {ours: theirs for theirs, ours in BETA_SCHEDULES.items()}[schedule.kind],
        "beta_start": schedule.beta_start,
        "clip_sample": False,
        "set_alpha_to_one": schedule.set_alpha_to_one,
        "skip_prk_steps": True,
        "steps_offset": schedule.steps_offset,
        "trained_betas": None,
    }
    if schedule.rescale_betas_zero_snr:
        settings["rescale_betas_zero_snr"] = True
    if sampler.spacing == "karras":
        settings["use_karras_sigmas"] = True
    elif sampler.spacing in ("leading", "linspace", "trailing"):
        settings["timestep_spacing"] = sampler.spacing
    if name == "dpmpp_2m_sde":
        settings["algorithm_type"] = "sde-dpmsolver++"
    if name == "ddpm" and sampler.variance == "large":
        settings["variance_type"] = "fixed_large"
    return settings


def _without_skipped_layers(state: State, config: TextEncoderConfig) -> State:
    layers = range(config.num_hidden_layers - config.skip_last_layers, config.num_hidden_layers)
    skipped = tuple(f"encoder.layers.{i}." for i in layers)
    return {name: tensor for name, tensor in state.items() if not name.startswith(skipped)}


def _write_part(folder: Path, settings: dict[str, Any], state: State, dtype: torch.dtype | None) -> None:
    native.write_tensors(folder / "diffusion_pytorch_model.safetensors", state, dtype)
    _write_json(folder / "config.json", settings)


def _write_tokenizer(folder: Path, files: list[Path], config: TextEncoderConfig) -> None:
    folder.mkdir()
    for path in files:
        shutil.copyfile(path, folder / path.name)
    if not (folder / "tokenizer_config.json").exists():
        end, begin = "<|endoftext|>", "<|startoftext|>"
        settings: dict[str, Any] = {"bos_token": begin, "eos_token": end, "pad_token": end, "unk_token": end}
        settings |= {"model_max_length": config.context_length, "tokenizer_class": "CLIPTokenizer"}
        _write_json(folder / "tokenizer_config.json", settings)


def _write_json(path: Path, settings: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
