"""Diffusers' folders of Stable Diffusion 1.x and 2.x, as published."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from stable_diffusion.checkpoints import families
from stable_diffusion.checkpoints.checkpoint import Checkpoint, packaged, published_text_state, text_state
from stable_diffusion.checkpoints.diffusers import schedulers, settings, weights
from stable_diffusion.checkpoints.files import State, write_tensors
from stable_diffusion.config import (
    CLIP_H,
    CLIP_L,
    SD15,
    AutoencoderKLConfig,
    AutoencoderTinyConfig,
    Guidance,
    ModelConfig,
    TextEncoderConfig,
    typed,
)
from stable_diffusion.diffusion.names import SAMPLERS, sampler_name
from stable_diffusion.errors import InputError, unknown_name
from stable_diffusion.files import is_file, read_bytes, read_json, replacing_folder, write_json

PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline",
             "StableDiffusionInpaintPipelineLegacy", "LatentConsistencyModelPipeline",
             "LatentConsistencyModelImg2ImgPipeline")  # fmt: skip
LEFT_ASIDE = ("safety_checker", "feature_extractor", "image_encoder")
TOKENIZERS = ("vocab.json", "tokenizer.json")


def is_diffusers(folder: Path) -> bool:
    """Whether a folder is a diffusers pipeline, or has its U-Net alone."""
    if any(is_file(folder / name) for name in ("model_index.json", "unet/config.json")):
        return True
    path = folder / "config.json"
    return is_file(path) and str(read_json(path).get("_class_name", "")).startswith("UNet2DCondition")


def read(folder: Path, *, variant: str | None = None) -> Checkpoint:
    """The checkpoint in a diffusers folder; autoencoder and text encoder are empty where their folders are not there.

    Args:
        folder: the pipeline, or its U-Net alone.
        variant: files to prefer, such as ``fp16`` or ``non_ema``; None takes the plain ones, else fp16's.

    Raises:
        InputError: a file is missing or damaged, the folder holds another kind of model, or no part has the
            variant.
    """
    aside = _left_aside(folder)
    lone = is_file(folder / "config.json") and not (folder / "unet").is_dir()
    denoiser = folder if lone else folder / "unet"
    unet_settings = _json(denoiser / "config.json", *settings.UNET_KEYS)
    unet = settings.unet_config(unet_settings)
    parts: dict[str, Any] = {"sampler": SD15.sampler}
    notes = ["The U-Net predicts epsilon: most do, and no scheduler/scheduler_config.json says otherwise."]
    if (folder / "scheduler").is_dir():
        schedule = _json(folder / "scheduler/scheduler_config.json", "_class_name")
        said = "says so" if "prediction_type" in schedule else "is silent, which is diffusers' word for it"
        parts = {
            "schedule": schedulers.schedule_config(schedule),
            "sampler": schedulers.sampler_config(schedule),
        }
        predicted = parts["schedule"].prediction_type
        notes = [f"The U-Net predicts {predicted}: scheduler/scheduler_config.json {said}."]
        notes += schedulers.scheduler_notes(schedule)
    if aside:
        notes.append(f"Left aside: {' and '.join(aside)}.")
    codec: AutoencoderKLConfig | AutoencoderTinyConfig = AutoencoderKLConfig(
        latent_channels=unet.out_channels
    )
    vae, text_encoder, tokenizer = State(), State(), folder
    if (folder / "vae").is_dir():
        codec = settings.autoencoder_config(_json(folder / "vae/config.json"))
        vae = weights.vae_state(weights.read_part(folder / "vae", weights.WEIGHTS["vae"], variant))
    text = TextEncoderConfig(hidden_size=unet.cross_attention_dim or 1, num_attention_heads=1)
    if (folder / "text_encoder").is_dir():
        text, text_encoder, tokenizer = read_text_encoder(folder, variant)
    if variant is not None and not weights.has_variant(folder, variant):
        raise InputError(
            f"{folder} has no files of the variant {variant!r}: {weights.variants_there(folder)}"
        )
    size = typed(int, unet_settings.get("sample_size", 64), "sample_size") * codec.factor
    parts |= {"unet": unet, "vae": codec, "text_encoders": (text,), "sample_size": size}
    config = ModelConfig(name=folder.resolve().name, **parts)
    if few := few_steps(config):
        config = replace(config, num_inference_steps=few[0], guidance=Guidance(scale=few[1]))
        notes.append(f"By default {few[0]} step{'s' * (few[0] > 1)}: {few[2]}.")
    state = weights.read_part(denoiser, weights.WEIGHTS["unet"], variant)
    return Checkpoint(config, vae, state, [text_encoder], [tokenizer], notes=tuple(notes))


def few_steps(config: ModelConfig) -> tuple[int, float, str] | None:
    """Steps and guidance scale of a model that was distilled to few steps, and what tells that it is one.

    A folder does not say how it wants to be used, its model's card does. What tells those cards' models apart is in
    the configurations: a U-Net that reads its guidance (LCM_Dreamshaper: 4 steps, scale 8), the scheduler of
    consistency models (LCM's or TCD's: 4 steps without guidance), a U-Net without a middle whose autoencoder is
    TAESD's (SDXS: 1 step), and Euler's trailing steps for eps without zero terminal SNR (SD-Turbo: 1 step).
    """
    sampler, schedule = config.sampler, config.schedule
    if config.unet.time_cond_proj_dim is not None:
        return 4, 8.0, "its U-Net reads its guidance, as latent consistency models' do"
    if SAMPLERS[sampler.name].spacing == "lcm":
        return 4, 1.0, "its scheduler is that of consistency models, which need no guidance"
    if config.unet.mid_block_type is None and isinstance(config.vae, AutoencoderTinyConfig):
        return 1, 1.0, "U-Net and autoencoder are SDXS', which needs no guidance"
    eps = schedule.prediction_type == "epsilon" and not schedule.rescale_betas_zero_snr
    if (sampler.name, sampler.spacing) == ("euler", "trailing") and eps:
        return 1, 1.0, "its scheduler (Euler, trailing, epsilon) is SD-Turbo's, which needs no guidance"
    return None


def read_text_encoder(folder: Path, variant: str | None = None) -> tuple[TextEncoderConfig, State, Path]:
    """A CLIP text encoder with its tensors and the folder of its tokenizer.

    Args:
        folder: has them in ``text_encoder`` and ``tokenizer``, as a pipeline, or is the text encoder itself. Of a whole
            CLIP the text encoder is read. Without a tokenizer beside it, it gets that of all published CLIPs.
        variant: as in ``read``.

    Raises:
        InputError: no such text encoder, or damaged files.
    """
    part = folder / "text_encoder" if (folder / "text_encoder").is_dir() else folder
    whole = read_json(part / "config.json")
    found = whole["text_config"] if isinstance(whole.get("text_config"), dict) else whole
    if "max_position_embeddings" not in found or not str(found.get("model_type", "clip")).startswith("clip"):
        raise InputError(f"{part / 'config.json'} is not the configuration of a CLIP text encoder")
    config = settings.text_encoder_config(found)
    if found is not whole and config.hidden_size == CLIP_H.hidden_size:
        config = replace(config, skip_last_layers=CLIP_H.skip_last_layers)  # where 2.x reads it
    state = text_state(weights.read_part(part, weights.WEIGHTS["text_encoder"], variant), config)
    own = [part] * any(is_file(part / name) for name in TOKENIZERS)
    tokenizers = [folder / "tokenizer", *own, part.parent / "tokenizer"]
    if config.vocab_size == CLIP_L.vocab_size:
        tokenizers.append(packaged("clip-tokenizer-2" if config.hidden_act == "gelu" else "clip-tokenizer"))
    return config, state, next(filter(Path.is_dir, tokenizers), tokenizers[0])


def _left_aside(folder: Path) -> list[str]:
    """The parts that are not read. Raises InputError for pipelines of other families."""
    index = _json(folder / "model_index.json") if is_file(folder / "model_index.json") else {}
    name = str(index.get("_class_name", PIPELINES[0]))
    for prefix, family in families.OTHER_PIPELINES.items():
        if name.startswith(prefix):
            raise families.other(folder, f"a {family} model ({name})")
    for part in ("text_encoder_2", "transformer", "prior"):
        if _is_there(index, part) or (folder / part).is_dir():
            raise families.other(
                folder, f"a model that has a {part}, as SDXL, Stable Diffusion 3 and Flux do"
            )
    if name not in PIPELINES:
        raise unknown_name("pipeline class", name, PIPELINES)
    return [part for part in LEFT_ASIDE if _is_there(index, part)]


def _is_there(index: dict[str, Any], part: str) -> bool:
    entry = index.get(part)
    return isinstance(entry, list) and any(name is not None for name in entry)


def _json(path: Path, *needed: str) -> dict[str, Any]:
    """The settings in a file, which must have those that are needed."""
    found = read_json(path)
    if missing := [key for key in needed if key not in found]:
        raise InputError(
            f"{path} does not say {', '.join(missing)}: it is not a configuration of Stable Diffusion 1.x or 2.x"
        )
    return found


def write(folder: Path, checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> tuple[str, ...]:
    """Writes a diffusers folder beside its final name, then puts it in place.

    Where the pipeline cannot hold the model, its scheduler and of U-Net and autoencoder what diffusers has are
    written alone.

    Args:
        folder: a name that nothing has, or an empty folder.
        checkpoint: what to write.
        dtype: number format of the files; None keeps the tensors'.

    Returns:
        What was not written or is not the same there, in sentences for the user.

    Raises:
        InputError: diffusers has no place for any part, or the folder cannot be written.
    """
    config = checkpoint.config
    reason = families.misfit(config)
    codec = families.vae_misfit(config.vae) is None
    text = config.unet.cross_attention_dim is not None  # diffusers' U-Net cannot be without
    written = [part for part, is_there in (("unet", text), ("vae", codec)) if is_there]
    if not written:
        raise InputError(f"diffusers has no place for any part of {config.name!r}: {reason}")
    with replacing_folder(folder) as building:
        texts = {"scheduler/scheduler_config.json": schedulers.scheduler_settings(config)}
        states = {}
        if text:
            texts["unet/config.json"], states["unet"] = settings.unet_settings(config), checkpoint.unet
        if codec:
            texts["vae/config.json"], states["vae"] = settings.vae_settings(config), checkpoint.vae
        if reason is None:
            (encoder,) = config.text_encoders
            kept = _without_skipped_layers(checkpoint.text_encoders[0], encoder)
            states["text_encoder"] = published_text_state(kept, encoder)
            texts["text_encoder/config.json"] = settings.text_settings(encoder)
            texts["model_index.json"] = pipeline_index(config)
            _write_tokenizer(building / "tokenizer", checkpoint.tokenizer_files[0], encoder)
        for part, state in states.items():
            write_tensors(building / part / f"{weights.WEIGHTS[part]}.safetensors", state, dtype)
        for name, content in texts.items():
            write_json(building / name, content)
    notes = []
    if reason is not None:
        notes.append(
            f"The model {config.name!r} cannot be a StableDiffusionPipeline, because {reason}: {folder} has its"
            f" {', '.join(written)} and scheduler alone."
        )
    elif config.schedule.kind != "flow" and config.schedule.steps_offset != 1:
        notes.append(
            "Diffusers' pipeline sets steps_offset to 1: its pictures differ with leading timesteps."
        )
    if config.schedule.kind != "flow":
        notes += schedulers.unsaid(config.sampler)
    else:
        notes.append(
            "Diffusers walks a rectified flow from 0.999 on and cuts times to whole numbers: its pictures differ a"
            " little."
        )
    return tuple(notes)


def pipeline_index(config: ModelConfig) -> dict[str, Any]:
    """The ``model_index.json``."""
    kind = "StableDiffusionInpaintPipeline" if config.reads_mask else "StableDiffusionPipeline"
    if config.unet.time_cond_proj_dim is not None and sampler_name(config.sampler.name) == "lcm":
        kind = "LatentConsistencyModelPipeline"
    return {
        "_class_name": kind,
        "_diffusers_version": settings.VERSION,
        **{part: [None, None] for part in LEFT_ASIDE},
        "requires_safety_checker": False,
        "scheduler": ["diffusers", schedulers.scheduler_settings(config)["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", settings.vae_settings(config)["_class_name"]],
    }


def _without_skipped_layers(state: State, config: TextEncoderConfig) -> State:
    layers = range(config.num_hidden_layers - config.skip_last_layers, config.num_hidden_layers)
    skipped = tuple(f"encoder.layers.{i}." for i in layers)
    return {name: tensor for name, tensor in state.items() if not name.startswith(skipped)}


def _write_tokenizer(folder: Path, files: list[Path], config: TextEncoderConfig) -> None:
    folder.mkdir()
    for path in files:
        (folder / path.name).write_bytes(read_bytes(path))
    if not (folder / "tokenizer_config.json").exists():
        end, begin = "<|endoftext|>", "<|startoftext|>"
        tokens = {"bos_token": begin, "eos_token": end, "pad_token": end, "unk_token": end}
        form = {"model_max_length": config.context_length, "tokenizer_class": "CLIPTokenizer"}
        write_json(folder / "tokenizer_config.json", tokens | form)
