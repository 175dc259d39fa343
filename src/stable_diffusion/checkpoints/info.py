"""What a file or a folder of weights is, in lines for the user."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from stable_diffusion import checkpoints
from stable_diffusion.checkpoints import Checkpoint, hub, lora, single_file
from stable_diffusion.checkpoints.diffusers import is_diffusers
from stable_diffusion.checkpoints.families import OTHER_ADAPTERS, WIDTHS, kind, long_name, lora_widths, misfit
from stable_diffusion.checkpoints.files import State, count, read_weights
from stable_diffusion.config import ModelConfig, Styles
from stable_diffusion.errors import shortened

UNSAID = ("format", "mini_stable_diffusion.config")
LONGEST = 100
"""Characters of a metadata value that are shown."""


def describe(path: str | Path) -> Iterator[str]:
    """The lines. Raises InputError where nothing can be read there."""
    path = hub.find(path)
    if not path.is_file():
        folder = "diffusers folder" if is_diffusers(path) else "model folder of this project"
        yield from _model(checkpoints.found(path), folder)
        if licence := _licence(path / "README.md"):
            yield f"  licence: {licence}"
        return
    content, metadata = read_weights(path)
    tensors = dict(_flat(content))
    found = kind(tensors)
    if found == "lora":
        yield from _lora(path, tensors, metadata)
    elif found == "embedding":
        vectors = [row for tensor in tensors.values() for row in tensor.reshape(-1, tensor.shape[-1])]
        width = vectors[0].shape[-1]
        yield f"{path.stem}: textual inversion for {long_name(width)}"
        yield f"  {len(vectors)} vector{'s' if len(vectors) > 1 else ''} of width {width}"
    elif found == "taesd":
        yield f"{path.stem}: light autoencoder (TAESD)"
        yield _part("tensors", tensors)
    elif found == "vae":
        yield f"{path.stem}: autoencoder of Stable Diffusion, single file"
        yield _part("vae", single_file.read_vae(path)[1])
    else:
        yield from _model(single_file.read(path), "single file in CompVis' layout")
    for key, value in sorted(metadata.items()):
        if key not in UNSAID:
            label = "licence" if key in ("license", "modelspec.license") else key
            yield f"  {label}: {shortened(value, LONGEST)}"


def _flat(content: dict[Any, Any], inner: bool = True) -> Iterator[tuple[str, Tensor]]:
    """A file's tensors, with those of a textual inversion's inner dictionary; a pickle may hold itself."""
    for name, value in content.items():
        if isinstance(value, Tensor):
            yield str(name), value
        elif inner and isinstance(value, dict) and name == "string_to_param":
            yield from _flat(value, inner=False)


def _model(checkpoint: Checkpoint, form: str) -> Iterator[str]:
    config = checkpoint.config
    process = f"{config.schedule.kind} schedule, predicts {config.schedule.prediction_type}"
    ground = " on a transparent ground" if config.alpha else ""
    yield f"{config.name}: {config.sample_size} pixels{ground}, {process}"
    yield f"  {form}, {_version(config)}"
    yield _part("unet", checkpoint.unet)
    if checkpoint.vae:
        yield _part("vae", checkpoint.vae)
    for i, state in enumerate(filter(None, checkpoint.text_encoders)):
        yield _part(f"text encoder {i + 1}", state)
    for part in checkpoint.missing:
        yield f"  no {part}: add {checkpoints.ADD[part][1]}"
    for note in checkpoint.notes:
        yield f"  {note}"
    steps = f"{config.num_inference_steps} steps of {config.sampler.name}"
    yield f"  by default {steps}, guidance {config.guidance.scale}"
    for prompt in config.prompts:
        yield f'  minisd generate "{prompt}"'
    if config.styles != Styles():
        yield f"  styles: {config.styles}"


def _version(config: ModelConfig) -> str:
    if misfit(config) is not None or config.schedule.kind != "scaled_linear":
        return "of this project alone"
    width = config.unet.cross_attention_dim
    name = long_name(width) if width in WIDTHS else f"of Stable Diffusion's kind, text width {width}"
    return name + ", inpainting" * config.reads_mask


def _lora(path: Path, tensors: State, metadata: dict[str, str]) -> Iterator[str]:
    for pattern, other in OTHER_ADAPTERS.items():
        if any(re.search(pattern, name) for name in tensors):
            yield f"{path.stem}: an adapter of another kind ({other}): only LoRA and DoRA can be applied"
            return
    modules, strange = lora.modules_in(path, tensors)
    down = {name: parts["down"] for name, parts in modules.items()}
    ranks = sorted({int(tensor.shape[0]) for tensor in down.values()})
    guess = next(map(long_name, lora_widths(down, {})), "an unknown base model")
    base = metadata.get("ss_base_model_version", guess)
    yield f"{path.stem}: LoRA for {base}, rank {' to '.join(map(str, sorted({ranks[0], ranks[-1]})))}"
    text = sum(re.search(r"encoder[._]layers", name) is not None for name in down)
    yield f"  {len(down) - text} modules of the U-Net, {text} of the text encoder"
    if strange:
        yield f"  {count(strange, len(tensors))} are no part of a LoRA"
    yield _part("tensors", tensors)


def _part(name: str, state: State) -> str:
    formats = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in state.values()})
    millions = sum(tensor.numel() for tensor in state.values()) / 1e6
    return f"  {name}: {millions:.1f} million parameters in {', '.join(formats)}"


def _licence(card: Path) -> str | None:
    """The licence that a model card's head names."""
    if not card.is_file():
        return None
    head = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    line = re.search(r"^licen[sc]e:\s*(.+)$", head[1], re.MULTILINE) if head else None
    return line[1].strip() if line else None
