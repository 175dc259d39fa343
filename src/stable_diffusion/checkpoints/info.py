"""What a file or a folder of weights is, in lines for the user."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from stable_diffusion import checkpoints
from stable_diffusion.checkpoints import Checkpoint, compvis, diffusers, hub
from stable_diffusion.checkpoints.checkpoint import State
from stable_diffusion.checkpoints.weights import read_weights
from stable_diffusion.config import AutoencoderKLConfig, ModelConfig, Styles

BASES = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "SDXL"}
"""By the width of the text's tokens."""

LORA = re.compile(
    r"\blora_(down|up|A|B)\b|_lora\.(down|up)\.|_lora\.linear_layer|\.(hada|lokr)_|\.oft_blocks"
)
LORA_DOWN = re.compile(r"(lora_down|lora_A|_lora\.down|lora\.down|lora_linear_layer\.down)\.weight$")
TAESD = re.compile(r"((en|de)coder\.)?(layers\.)?\d+\.(conv\.\d+\.|skip\.)?(weight|bias)")
UNSAID = ("format", "mini_stable_diffusion.config")
LONGEST = 100
"""Characters of a metadata value that are shown."""


def describe(path: str | Path) -> Iterator[str]:
    """The lines. Raises InputError where nothing can be read there."""
    path = Path(path)
    if not path.exists() and hub.is_name(path):
        path = hub.fetch(path.as_posix())
    if not path.is_file():
        kind = "diffusers folder" if diffusers.is_diffusers(path) else "model folder of this project"
        yield from _model(checkpoints.read(path), kind)
        if licence := _licence(path / "README.md"):
            yield f"  licence: {licence}"
        return
    tensors, metadata = _open(path)
    names = list(tensors)
    parts = {
        "unet": any(name.startswith(("model.diffusion_model.", "input_blocks.")) for name in names),
        "vae": any(re.match(r"first_stage_model\.|(en|de)coder\.(conv_in|mid)\b", name) for name in names),
        "text encoder": any(name.startswith(("cond_stage_model.", "conditioner.")) for name in names),
    }
    if any(LORA.search(name) for name in names):
        yield from _lora(path, tensors, metadata)
    elif vectors := _vectors(tensors):
        yield f"{path.stem}: textual inversion for {_base(int(vectors[0].shape[-1]))}"
        yield f"  {len(vectors)} vector{'s' if len(vectors) > 1 else ''} of width {vectors[0].shape[-1]}"
    elif names and all(TAESD.fullmatch(name) for name in names):
        yield f"{path.stem}: light autoencoder (TAESD)"
        yield _part("tensors", tensors)
    elif parts == {"unet": False, "vae": True, "text encoder": False}:
        _, state = compvis.read_vae(path)
        yield f"{path.stem}: autoencoder of Stable Diffusion, single file"
        yield _part("vae", state)
    elif parts == {"unet": True, "vae": False, "text encoder": False}:
        unet, state = compvis.read_unet(path)
        yield f"{path.stem}: U-Net of {_base(unet.cross_attention_dim)}, single file"
        yield _part("unet", state)
    else:
        yield from _model(compvis.read(path), "single file in CompVis' layout")
    for key, value in sorted(metadata.items()):
        if key not in UNSAID:
            label = "licence" if key in ("license", "modelspec.license") else key
            yield f"  {label}: {value if len(value) <= LONGEST else value[:LONGEST] + ' …'}"


def _open(path: Path) -> tuple[State, dict[str, str]]:
    """A file's tensors, with those of inner dictionaries, and its metadata."""
    content, metadata = read_weights(path)
    return dict(_flat(content)), metadata


def _flat(content: dict[Any, Any]) -> Iterator[tuple[str, Tensor]]:
    for name, value in content.items():
        if isinstance(value, Tensor):
            yield str(name), value
        elif isinstance(value, dict) and name in ("state_dict", "string_to_param"):
            yield from _flat(value)


def _model(checkpoint: Checkpoint, kind: str) -> Iterator[str]:
    config = checkpoint.config
    yield (
        f"{config.name}: {config.sample_size} pixels, {config.schedule.kind} schedule,"
        f" predicts {config.schedule.prediction_type}"
    )
    yield f"  {kind}, {_version(config)}"
    yield _part("unet", checkpoint.unet)
    yield _part("vae", checkpoint.vae)
    for i, state in enumerate(checkpoint.text_encoders):
        yield _part(f"text encoder {i + 1}", state)
    for note in checkpoint.notes:
        yield f"  {note}"
    yield (
        f"  by default {config.num_inference_steps} steps of {config.sampler.name},"
        f" guidance {config.guidance.scale}"
    )
    for prompt in config.prompts:
        yield f'  minisd generate "{prompt}"'
    if config.styles != Styles():
        yield f"  styles: {config.styles}"


def _version(config: ModelConfig) -> str:
    text = config.text_encoders
    published = len(text) == 1 and text[0].architecture == "clip" and config.schedule.kind == "scaled_linear"
    if not (published and isinstance(config.vae, AutoencoderKLConfig)):
        return "of this project's own kind"
    width = config.unet.cross_attention_dim
    inpainting = ", inpainting" if config.unet.in_channels == 9 else ""
    return BASES.get(width or 0, f"of Stable Diffusion's kind, text width {width}") + inpainting


def _lora(path: Path, tensors: State, metadata: dict[str, str]) -> Iterator[str]:
    down = {name: tensor for name, tensor in tensors.items() if LORA_DOWN.search(name)}
    ranks = sorted({int(tensor.shape[0]) for tensor in down.values()})
    widths = {int(t.shape[1]) for name, t in down.items() if re.search(r"attn2[._](processor\.)?to_k", name)}
    base = metadata.get("ss_base_model_version") or (
        _base(min(widths)) if widths else "an unknown base model"
    )
    if not down:
        yield f"{path.stem}: adapter that is no LoRA (LoHa, LoKr or OFT): not supported"
        return
    yield f"{path.stem}: LoRA for {base}, rank {' to '.join(map(str, sorted({ranks[0], ranks[-1]})))}"
    text = sum("te_" in name[:8] or name.startswith("text_encoder") for name in down)
    yield f"  {len(down) - text} modules of the U-Net, {text} of the text encoder"
    yield _part("tensors", tensors)


def _vectors(tensors: State) -> list[Tensor]:
    """The vectors of a textual inversion: a handful of rows and nothing else."""
    if not 0 < len(tensors) < 10 or not all(tensor.ndim in (1, 2) for tensor in tensors.values()):
        return []
    if not all(tensor.shape[-1] in BASES for tensor in tensors.values()):
        return []
    return [row for tensor in tensors.values() for row in tensor.reshape(-1, tensor.shape[-1])]


def _base(width: int | None) -> str:
    return BASES.get(width or 0, f"an unknown base model (text width {width})")


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
