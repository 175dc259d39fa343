"""Diffusers' folders of Stable Diffusion 1.x and 2.x, as published."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from stable_diffusion.checkpoints import families
from stable_diffusion.checkpoints.checkpoint import Checkpoint, published_text_state, text_state
from stable_diffusion.checkpoints.diffusers import schedulers, settings, weights
from stable_diffusion.checkpoints.files import State, write_tensors
from stable_diffusion.config import AutoencoderKLConfig, ModelConfig, TextEncoderConfig, typed
from stable_diffusion.errors import InputError, unknown_name
from stable_diffusion.files import read_json, replacing_folder, write_json

PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline",
             "StableDiffusionInpaintPipelineLegacy")  # fmt: skip
LEFT_ASIDE = ("safety_checker", "feature_extractor", "image_encoder")


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
    text = settings.text_encoder_config(_json(folder / "text_encoder/config.json", "max_position_embeddings"))
    schedule = _json(folder / "scheduler/scheduler_config.json", "_class_name")
    unet = _json(folder / "unet/config.json", *settings.UNET_KEYS)
    vae = settings.autoencoder_config(_json(folder / "vae/config.json", *settings.VAE_KEYS))
    config = ModelConfig(
        name=folder.resolve().name,
        sample_size=typed(int, unet.get("sample_size", 64), "sample_size") * vae.factor,
        vae=vae,
        unet=settings.unet_config(unet),
        text_encoders=(text,),
        schedule=schedulers.schedule_config(schedule),
        sampler=schedulers.sampler_config(schedule),
    )
    said = "says so" if "prediction_type" in schedule else "is silent, which is diffusers' word for it"
    notes = [f"The U-Net predicts {config.schedule.prediction_type}: scheduler/scheduler_config.json {said}."]
    if aside:
        notes.append(f"Left aside: {' and '.join(aside)}.")
    notes += schedulers.scheduler_notes(schedule)
    states = {part: weights.read_part(folder / part, stem, variant) for part, stem in weights.WEIGHTS.items()}
    if variant is not None and not weights.has_variant(folder, variant):
        raise InputError(
            f"{folder} has no files of the variant {variant!r}: {weights.variants_there(folder)}"
        )
    return Checkpoint(
        config,
        vae=weights.vae_state(states["vae"]),
        unet=states["unet"],
        text_encoders=[text_state(states["text_encoder"], text)],
        tokenizers=[folder / "tokenizer"],
        notes=tuple(notes),
    )


def _left_aside(folder: Path) -> list[str]:
    """The parts that are not read. Raises InputError for pipelines of other families."""
    index = _json(folder / "model_index.json")
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
        InputError: there is something at `folder`, or diffusers has no place for any part.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"{folder} exists: choose another name")
    config = checkpoint.config
    reason = families.misfit(config)
    kl = isinstance(config.vae, AutoencoderKLConfig) and config.vae.codebook_size is None
    text = config.unet.cross_attention_dim is not None  # diffusers' U-Net cannot be without
    written = [part for part, is_there in (("unet", text), ("vae", kl)) if is_there]
    if not written:
        raise InputError(f"diffusers has no place for any part of {config.name!r}: {reason}")
    with replacing_folder(folder) as building:
        texts = {"scheduler/scheduler_config.json": schedulers.scheduler_settings(config)}
        states = {}
        if text:
            texts["unet/config.json"], states["unet"] = settings.unet_settings(config), checkpoint.unet
        if kl:
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
    return {
        "_class_name": "StableDiffusionInpaintPipeline" if config.reads_mask else "StableDiffusionPipeline",
        "_diffusers_version": settings.VERSION,
        **{part: [None, None] for part in LEFT_ASIDE},
        "requires_safety_checker": False,
        "scheduler": ["diffusers", schedulers.scheduler_settings(config)["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def _without_skipped_layers(state: State, config: TextEncoderConfig) -> State:
    layers = range(config.num_hidden_layers - config.skip_last_layers, config.num_hidden_layers)
    skipped = tuple(f"encoder.layers.{i}." for i in layers)
    return {name: tensor for name, tensor in state.items() if not name.startswith(skipped)}


def _write_tokenizer(folder: Path, files: list[Path], config: TextEncoderConfig) -> None:
    folder.mkdir()
    for path in files:
        shutil.copyfile(path, folder / path.name)
    if not (folder / "tokenizer_config.json").exists():
        end, begin = "<|endoftext|>", "<|startoftext|>"
        tokens = {"bos_token": begin, "eos_token": end, "pad_token": end, "unk_token": end}
        form = {"model_max_length": config.context_length, "tokenizer_class": "CLIPTokenizer"}
        write_json(folder / "tokenizer_config.json", tokens | form)
