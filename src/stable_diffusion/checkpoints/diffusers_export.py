"""Writing diffusers' folders: what fits its pipeline whole, of the rest the parts that it has."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from stable_diffusion.checkpoints import native
from stable_diffusion.checkpoints.checkpoint import (
    Checkpoint,
    State,
    published_text_state,
)
from stable_diffusion.checkpoints.diffusers import BETA_SCHEDULES, LEFT_ASIDE, UNET_FIXED
from stable_diffusion.config import (
    AutoencoderKLConfig,
    ModelConfig,
    TextEncoderConfig,
)
from stable_diffusion.diffusion.names import SAMPLERS, SPACINGS, sampler_name
from stable_diffusion.errors import InputError

DIFFUSERS_VERSION = "0.42.1"  # whose form the folders that we write have


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
    name = sampler_name(sampler.name)
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
        "_class_name": SAMPLERS[name].diffusers,
        **SAMPLERS[name].diffusers_settings,
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
    if sampler.spacing is not None:
        settings |= SPACINGS[sampler.spacing].diffusers
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
