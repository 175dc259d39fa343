"""A whole training run: plan, decode the pictures, autoencoder, latents, text, denoiser."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from PIL import Image
from torch import Tensor, nn

from stable_diffusion import images
from stable_diffusion.config import ModelConfig, StageConfig, to_dict
from stable_diffusion.data.cache import Array, ArrayCache, digest
from stable_diffusion.data.item import CaptionedImages
from stable_diffusion.errors import InputError
from stable_diffusion.generation.pipeline import Parts
from stable_diffusion.runtime import has_native_bf16
from stable_diffusion.training.autoencoder import AutoencoderStage, DecoderStage, normalise, read_pixels
from stable_diffusion.training.denoiser import DenoiserStage, TextCache
from stable_diffusion.training.loop import CompiledOrEager, Compiler, TrainStep, train_stage
from stable_diffusion.training.whitening import whitened

SHARES = {"autoencoder": 0.15, "decoder": 0.1}  # of a budget in minutes; the denoiser has the rest
ENCODED_TOGETHER = 32  # pictures, or captions
OVERHEAD = 1.1  # reading batches, the optimizer's step, saving: beside what is measured


AnyStage = AutoencoderStage | DenoiserStage | DecoderStage


class TrainableParts(Parts, Protocol):
    """What training needs of a model."""

    config: ModelConfig


@dataclass(frozen=True)
class Plan:
    """What a run is going to do; ``str`` is the line that it begins with."""

    name: str
    pictures: int
    captions: int
    steps: dict[str, int]
    """Optimizer updates of each stage."""
    seconds: dict[str, float]
    """Measured time of one update of each stage."""
    device: str
    number_format: str

    def __str__(self) -> str:
        stages = ", ".join(f"{stage} {count} steps" for stage, count in self.steps.items())
        minutes = sum(count * self.seconds[stage] for stage, count in self.steps.items()) / 60
        return (
            f"training {self.name} on {self.pictures} pictures with {self.captions} captions: {stages};"
            f" about {minutes:.0f} minutes on {self.device} in {self.number_format}"
        )


def train_model(
    parts: TrainableParts,
    data: CaptionedImages,
    *,
    output_dir: Path,
    steps: int | None = None,
    minutes: float | None = None,
    resume: bool = True,
    autocast: bool = False,
    compiler: Compiler | None = None,
) -> Generator[Plan | TrainStep, None, None]:
    """Trains a model's parts in place: first the plan, then every step of every stage.

    Arguments and errors are those of ``DiffusionModel.train``.
    """
    if steps is not None and minutes is not None:
        raise InputError(f"give steps or minutes, not both: got steps {steps} and minutes {minutes}")
    for name, value in (("steps", steps), ("minutes", minutes)):
        if value is not None and not value > 0:
            raise InputError(f"{name} must be above 0, got {value}")
    if len(data) == 0:
        raise InputError("there are no captioned pictures to train on: the set is empty")
    config = parts.config
    device = next(parts.unet.parameters()).device
    state = PartialState(cpu=device.type == "cpu")
    dtype = autocast_dtype(device) if autocast else None
    if parts.unet.conv_out.weight.dtype != torch.float32:
        raise InputError("training keeps its weights in float32: load the model with dtype=torch.float32")

    autoencoder = AutoencoderStage(parts.vae, config.training.autoencoder, config.sample_size)
    denoiser = DenoiserStage(parts.unet, parts.text_encoder, parts.scheduler, config)
    sharpening = config.training.decoder
    decoders = [] if sharpening is None else [DecoderStage(parts.vae, sharpening, config.sample_size)]
    all_stages: list[AnyStage] = [autoencoder, denoiser, *decoders]
    stages = [stage for stage in all_stages if stage.settings.passes > 0]
    for module in (parts.vae, parts.unet):
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # missing in torch's stubs
    compiling = None if compiler is None else CompiledOrEager(compiler)
    functions = {stage.name: _step_function(stage, compiling, state) for stage in stages}

    identity = digest(  # of what training reads: other prompts or steps of sampling are no other run
        (config.sample_size, config.vae, config.unet, config.text_encoders, config.schedule, config.training),
        [(data.name(i), data.captions(i), data.weight(i)) for i in range(len(data))],
    )
    if state.is_main_process:
        _open_folder(output_dir, identity, resume)
    state.wait_for_everyone()
    stored = _stored_plan(output_dir, steps, minutes, functions)
    if stored is None:  # measured by all processes together, as they compute together; the first one's counts
        plan = _measured_plan(len(data), config, steps, minutes, stages, functions, dtype)
        stored = broadcast_object_list([plan])[0]
        if state.is_main_process:
            write_json(output_dir / "run.json", {"identity": identity, **stored})
    captions = sorted({caption for i in range(len(data)) for caption in data.captions(i)} - {""})
    yield Plan(
        name=config.name,
        pictures=len(data),
        captions=len(captions),
        steps=stored["steps"],
        seconds=stored["seconds"],
        device=str(device),
        number_format=str(dtype or torch.float32).removeprefix("torch."),
    )

    def trained(stage: AnyStage) -> Iterator[TrainStep]:
        return train_stage(
            stage,
            total=stored["steps"][stage.name],
            seed=config.training.seed,
            path=output_dir / f"{stage.name}.safetensors",
            step_function=functions[stage.name],
            autocast=dtype,
            process=state.process_index,
            processes=state.num_processes,
        )

    with state.main_process_first():
        pictures_key, pictures, kept = yield from _decode_pictures(
            data, config.sample_size, output_dir / "cache"
        )
    if autoencoder in stages:
        autoencoder.pictures = pictures
        yield from trained(autoencoder)
        normalise(parts.vae, pictures)

    with state.main_process_first():
        latents = yield from _encode_pictures(parts, pictures, pictures_key, output_dir / "cache")
        text_caches = yield from _encode_captions(parts, ["", *captions], output_dir / "cache")
    numbers = {caption: number for number, caption in enumerate(captions, start=1)}
    # Eigenvectors may differ from one machine to another: the first process's count.
    changes = broadcast_object_list([[cache and cache.whitening() for cache in text_caches]])[0]
    for cache, change in zip(text_caches, changes, strict=True):
        if cache is not None:
            cache.change = change
    if denoiser in stages:
        with whitened(parts.unet, parts.text_encoder, changes):
            denoiser.latents, denoiser.text_caches = latents, text_caches
            denoiser.captions = ["", *captions]
            denoiser.captions_of = [[numbers[caption] for caption in data.captions(i)] for i in kept]
            denoiser.weights = tuple(data.weight(i) for i in kept)
            yield from trained(denoiser)
    for decoder in (stage for stage in decoders if stage in stages):
        decoder.pictures, decoder.latents = pictures, latents
        yield from trained(decoder)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The 16-bit format that the device is good at; None, with a warning, where it is good at none."""
    if has_native_bf16(device):
        return torch.bfloat16
    if device.type == "cuda":
        return torch.float16
    warnings.warn(f"this {device.type} is not faster in 16 bits: training in float32", stacklevel=4)
    return None


def _step_function(
    stage: nn.Module, compiling: CompiledOrEager | None, state: PartialState
) -> Callable[..., Tensor]:
    """What computes a stage's loss: the stage, its copies on several devices kept equal, or it compiled."""
    if state.num_processes > 1:
        devices = None if state.device.type == "cpu" else [state.device]
        stage = nn.parallel.DistributedDataParallel(stage.to(state.device), device_ids=devices)
    return stage if compiling is None else compiling(stage)


def _open_folder(folder: Path, identity: str, resume: bool) -> None:
    """Makes the run's folder. Raises InputError where another run is in it."""
    record = folder / "run.json"
    if not resume:
        for name in ("run.json", *(f"{stage}.safetensors" for stage in (*SHARES, "denoiser"))):
            (folder / name).unlink(missing_ok=True)
    elif record.is_file() and json.loads(record.read_text())["identity"] != identity:
        raise InputError(
            f"{folder} holds the training of another configuration or of other pictures: choose another output_dir,"
            " or resume=False to replace it"
        )
    folder.mkdir(parents=True, exist_ok=True)


def _stored_plan(
    folder: Path, steps: int | None, minutes: float | None, stages: Iterable[str]
) -> dict[str, Any] | None:
    """The plan of the run that is being resumed, unless another length is asked for."""
    record = folder / "run.json"
    if not record.is_file():
        return None
    stored = json.loads(record.read_text())
    if steps is not None:
        stored["steps"] = dict.fromkeys(stages, steps)
    same = minutes is None or stored["minutes"] == minutes
    return {key: stored[key] for key in ("steps", "seconds", "minutes")} if same else None


def _measured_plan(
    count: int,
    config: ModelConfig,
    steps: int | None,
    minutes: float | None,
    stages: list[AnyStage],
    functions: dict[str, Callable[..., Tensor]],
    dtype: torch.dtype | None,
) -> dict[str, Any]:
    seconds = {stage.name: _measure(stage, functions[stage.name], dtype) for stage in stages}
    shares = SHARES | {"denoiser": 1 - sum(SHARES.get(stage.name, 0.0) for stage in stages)}
    totals = {}
    for stage in stages:
        settings: StageConfig = stage.settings
        if minutes is not None:
            totals[stage.name] = max(1, int(60 * minutes * shares[stage.name] / seconds[stage.name]))
        elif steps is not None:
            totals[stage.name] = steps
        else:
            totals[stage.name] = max(settings.min_steps, round(settings.passes * count / settings.batch_size))
    return {"steps": totals, "seconds": seconds, "minutes": minutes}


def _measure(stage: AnyStage, step: Callable[..., Tensor], dtype: torch.dtype | None) -> float:
    """Seconds of one update: the second and third of three on random tensors. It changes no weight."""
    batch = stage.example()
    device = batch[0].device
    times = []
    for _ in range(3):
        began = time.perf_counter()
        with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            loss = step(*batch)
        loss.backward()
        float(loss.detach())  # waits for the device
        times.append(time.perf_counter() - began)
        stage.zero_grad(set_to_none=True)
    return OVERHEAD * sum(times[1:]) / 2


def _decode_pictures(
    data: CaptionedImages, size: int, folder: Path
) -> Generator[TrainStep, None, tuple[str, Array, list[int]]]:
    """Every picture at the training size; gives their cache's key, the array, and the pictures' numbers."""
    files = [
        (data.name(i), (stat := data.path(i).stat()).st_size, stat.st_mtime_ns) for i in range(len(data))
    ]
    key = digest(files, size)
    cache = ArrayCache(folder, "pictures", key, (len(data), size, size, 3), "uint8")
    record = folder / "damaged.json"
    damaged: list[int] = []

    def blocks() -> Iterator[Array]:
        for i in range(len(data)):
            try:
                picture = images.cover(data[i].image, size, size)
            except InputError:  # named below; the loader has seen only the file's first bytes
                damaged.append(i)
                picture = Image.new("RGB", (size, size))
            yield np.asarray(picture)[None]
        write_json(record, damaged)

    for done in cache.fill(blocks()):
        yield TrainStep("reading pictures", done - 1, len(data))
    damaged = json.loads(record.read_text())
    kept = sorted(set(range(len(data))) - set(damaged))
    if damaged:
        names = ", ".join(data.name(i) for i in damaged[:3])
        warnings.warn(f"{len(damaged)} pictures cannot be decoded and are left out: {names}", stacklevel=2)
    if not kept:
        raise InputError(f"none of the {len(data)} pictures can be decoded: check the image folder")
    pictures = cache.read()
    return key, (pictures[kept] if damaged else pictures), kept


@torch.no_grad()
def _encode_pictures(
    parts: Parts, pictures: Array, pictures_key: str, folder: Path
) -> Generator[TrainStep, None, Array]:
    """The latents of every picture, in float16."""
    side = pictures.shape[1] // parts.vae.config.factor
    shape = (len(pictures), parts.vae.config.latent_channels, side, side)
    key = digest(pictures_key, shape, *_arrays(parts.vae))
    cache = ArrayCache(folder, "latents", key, shape, "float16")
    device = parts.unet.conv_out.weight.device

    def blocks() -> Iterator[Array]:
        for start in range(0, len(pictures), ENCODED_TOGETHER):
            indices = list(range(start, min(start + ENCODED_TOGETHER, len(pictures))))
            pixels = read_pixels(pictures, indices, device)
            yield parts.vae.encode(pixels.contiguous(memory_format=torch.channels_last)).cpu().numpy()

    for done in cache.fill(blocks()):
        yield TrainStep("encoding pictures", done - 1, len(pictures))
    return cache.read()


@torch.no_grad()
def _encode_captions(
    parts: Parts, captions: list[str], folder: Path
) -> Generator[TrainStep, None, list[TextCache | None]]:
    """Each frozen encoder's embeddings of the captions; None for an encoder that trains along."""
    caches: list[TextCache | None] = []
    chunks = [captions[i : i + ENCODED_TOGETHER] for i in range(0, len(captions), ENCODED_TOGETHER)]
    for i, config in enumerate(parts.text_encoder.configs):
        if config.trainable:
            caches.append(None)
            continue
        tokenizer = parts.text_encoder.tokenizers[i]
        reads_padding = config.architecture == "clip"
        masks = torch.cat([tokenizer(chunk).attention_mask | reads_padding for chunk in chunks])
        starts = np.concatenate([[0], np.cumsum(masks.sum(dim=1).numpy() + 1)])
        key = digest(captions, to_dict(config), *_arrays(parts.text_encoder.encoders[i]))
        shape = (int(starts[-1]), config.hidden_size)
        cache = ArrayCache(folder, f"captions-{i + 1}", key, shape, "float16")

        def blocks(i: int = i) -> Iterator[Array]:
            for chunk in chunks:
                embeds = parts.text_encoder.encode(i, chunk)
                tokens, pooled = embeds.tokens.cpu(), embeds.pooled.cpu()
                mask = torch.ones(tokens.shape[:2], dtype=torch.bool)
                if embeds.mask is not None:
                    mask = embeds.mask.cpu()
                for said, real, whole in zip(tokens, mask, pooled, strict=True):
                    yield torch.cat([said[real], whole[None]]).numpy()

        for done in cache.fill(blocks()):
            number = int(np.searchsorted(starts, done)) - 1
            yield TrainStep("encoding captions", number, len(captions))
        caches.append(TextCache(cache.read(), starts, config.context_length))
    return caches


def _arrays(module: nn.Module) -> list[Array]:
    """A module's weights, for a cache's key."""
    return [parameter.detach().cpu().contiguous().numpy() for parameter in module.parameters()]


def write_json(path: Path, value: object) -> None:
    """Writes a JSON file beside its name, then puts it in place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    building = path.with_suffix(".part")
    building.write_text(json.dumps(value, indent=2) + "\n")
    building.replace(path)
