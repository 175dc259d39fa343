"""LoRA files of kohya's scripts and of diffusers/PEFT, read onto a model's layers (Hu et al. 2021, equation 3).

A file names each module in one of several published spellings. None is parsed: a table made from our own
modules' names holds every spelling of each, since underscores that stand for dots cannot be told from others.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stable_diffusion.checkpoints import families
from stable_diffusion.checkpoints.families import UNET
from stable_diffusion.checkpoints.files import State, read_weights
from stable_diffusion.checkpoints.single_file.names import unet_blocks
from stable_diffusion.config import ModelConfig, UNetConfig
from stable_diffusion.errors import InputError, three_of
from stable_diffusion.nn.adapters import Layer, LoRA, checked
from stable_diffusion.nn.text import PromptEncoder
from stable_diffusion.nn.unet import UNet

OLD_TEXT_NAMES = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
PEFT_SETTINGS = "lora_adapter_metadata"
FEW_STEPS = {
    r"hyper.?sd": "ddim --spacing trailing",
    **{rf"(?<![a-z]){sampler}(?![a-z])": sampler for sampler in ("lcm", "tcd")},
}
"""Samplers of published LoRAs that distil a model to few steps, by their names."""


def read(
    path: Path, unet: UNet, text: PromptEncoder, config: ModelConfig, weight: float = 1.0
) -> tuple[dict[Layer, LoRA], str]:
    """A file's change of each layer, and how many of its modules found one, as a sentence.

    Warns where the model has a place for only a part. `weight` times each change is tried on its layer.

    Raises:
        InputError: the file is damaged, not a LoRA, for another model, or has no place here, or `weight` is not a
            number or would make the layers' weights infinite.
    """
    weight = checked(path.stem, weight)
    tensors, metadata = read_weights(path)
    modules, strange = modules_in(path, tensors)
    check_base(path, modules, metadata, config)
    table = _table(unet, text, config)
    found: dict[Layer, LoRA] = {}
    for name, parts in modules.items():
        if (layer := table.get(name)) is None:
            strange.append(name)
            continue
        if layer in found:
            raise InputError(f"{path} has two changes for the same module, the second is {name}")
        found[layer] = _lora(f"{name} of {path}", layer, parts, weight, _peft(path, name, metadata))
    count, total = len(found), len(found) + len(strange)
    examples = three_of(sorted(strange)) or "empty"
    if not found:
        raise InputError(f"{path}: none of {total} modules is in the model {config.name!r} ({examples})")
    result = f"{path.name}: {count} of {total} modules applied{advice(path, metadata)}"
    if strange:
        warnings.warn(f"{result}; not in this model: {examples}", stacklevel=3)
    return found, result


def advice(path: Path, metadata: dict[str, str]) -> str:
    """How a published few-step LoRA (Hyper-SD, LCM, TCD) is to be used, as the end of a sentence; empty for others.

    The settings are those of its card. No tensor tells them; the file's name does (its folder's, where the file has
    diffusers' own name), or a name in its metadata.
    """
    said = path.parent.name if path.stem == "pytorch_lora_weights" else path.stem
    name = " ".join([said, *(metadata.get(key, "") for key in ("ss_output_name", "modelspec.title"))]).lower()
    for word, sampler in FEW_STEPS.items():
        if re.search(word, name):
            found, guidance = re.search(r"(\d+)[-_ ]?steps?", name), 5 if "cfg" in name else 1
            steps = found[1] if found else 4
            return f"; its card's settings: --steps {steps} --guidance {guidance} --sampler {sampler}"
    return ""


def modules_in(path: Path, tensors: dict[str, Any]) -> tuple[dict[str, State], list[str]]:
    """Each module's tensors by what they are, and names that belong to no module.

    Raises InputError where the file holds another kind of adapter, or is damaged.
    """
    modules: dict[str, State] = {}
    strange = []
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):  # what a training program keeps beside the weights
            continue
        for pattern, kind in families.OTHER_ADAPTERS.items():
            if re.search(pattern, name):
                raise InputError(f"{path} holds {kind} ({name}): only LoRA and DoRA files can be applied")
        part = families.lora_part(name)
        if part is None:
            strange.append(name)
            continue
        if not tensor.numel() or not torch.isfinite(tensor.float()).all():
            raise InputError(f"{path} holds nothing, NaN or infinity in {name}: the file is damaged")
        modules.setdefault(part[0], {})[part[1]] = tensor
    for name, parts in modules.items():
        if missing := {"up", "down"} - parts.keys():
            raise InputError(f"{path} is incomplete: {name} has no {' and no '.join(sorted(missing))} matrix")
        if parts["up"].ndim < 2 or parts["down"].ndim < 2:
            raise InputError(f"{path} is damaged: {name} has a vector where a matrix should be")
    return modules, strange


def check_base(path: Path, modules: dict[str, State], metadata: dict[str, str], config: ModelConfig) -> None:
    """Raises InputError for a file that was made for another base model, as its names, shapes or metadata say."""
    ours = config.unet.cross_attention_dim
    for pattern, kind in families.OTHER_LORAS.items():
        if any(re.search(pattern, name) for name in modules):
            raise families.wrong_base(path, kind, ours)
    downs = {name: parts["down"] for name, parts in modules.items()}
    # Many shapes are the same in all versions; what metadata say is of published ones alone.
    for width in families.lora_widths(downs, metadata if ours in families.WIDTHS else {}):
        families.check_width(path, width, ours)
        break


def _table(unet: UNet, text: PromptEncoder, config: ModelConfig) -> dict[str, Layer]:
    """The layer that each published name of a module stands for."""
    table: dict[str, Layer] = {}
    for path, layer in _layers(unet):
        table |= dict.fromkeys(unet_spellings(path, config.unet), layer)
    for encoder, settings in zip(text.encoders, config.text_encoders, strict=True):
        if settings.architecture == "clip":
            for path, layer in _layers(encoder):
                table |= dict.fromkeys(text_spellings(path), layer)
            break
    return table


def _layers(network: nn.Module) -> Iterator[tuple[str, Layer]]:
    for path, module in network.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            yield path, module


def unet_spellings(path: str, config: UNetConfig) -> list[str]:
    """The published names of a U-Net module whose path is ours, which is diffusers'."""
    blocks = unet_blocks(config)
    block = path
    while block and block not in blocks:
        block = block.rpartition(".")[0]
    names = [path, f"unet.{path}", f"base_model.model.{path}"]
    names += [f"{prefix}_{path.replace('.', '_')}" for prefix in ("lora_unet", "lycoris")]
    if block:
        compvis = blocks[block] + path.removeprefix(block)
        names += [f"lora_unet_{compvis.replace('.', '_')}", f"diffusion_model.{compvis}", UNET + compvis]
    parent, _, leaf = path.removesuffix(".0").rpartition(".")
    if leaf in OLD_TEXT_NAMES.values():
        for old in (f"{parent}.processor.{leaf}", f"{parent}.{leaf}"):
            names += [old, f"unet.{old}"]
    return names


def text_spellings(path: str) -> list[str]:
    """The published names of a module of CLIP's text encoder whose path is ours, which is transformers'."""
    parent, _, leaf = path.rpartition(".")
    names = [f"lora_te_{model}{path.replace('.', '_')}" for model in ("text_model_", "")]
    names += [f"text_encoders.clip_{size}.transformer.text_model.{path}" for size in "lh"]
    for model in ("", "text_model."):
        for prefix in ("", "text_encoder.", "base_model.model."):
            names.append(f"{prefix}{model}{path}")
            if leaf in OLD_TEXT_NAMES:
                names.append(f"{prefix}{model}{parent}.{OLD_TEXT_NAMES[leaf]}")
    return names


def _peft(path: Path, name: str, metadata: dict[str, str]) -> tuple[float | None, bool]:
    """PEFT's alpha of a module, None where the file says none, and whether it is divided by the rank's root.

    Diffusers stores PEFT's configuration in the header, with the part's name before each key.
    """
    if PEFT_SETTINGS not in metadata:
        return None, False
    try:
        settings = json.loads(metadata[PEFT_SETTINGS])
        part = f"{name.partition('.')[0]}."
        settings |= {key.removeprefix(part): settings[key] for key in list(settings) if key.startswith(part)}
        alpha = settings.get("lora_alpha")
        for pattern, value in (settings.get("alpha_pattern") or {}).items():
            if f".{name}".endswith(f".{pattern}"):  # taken as it is: an expression may not end
                alpha = value
                break
        return None if alpha is None else float(alpha), bool(settings.get("use_rslora"))
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise InputError(f"the metadata {PEFT_SETTINGS} of {path} is damaged ({error})") from None


def _lora(name: str, layer: Layer, parts: State, weight: float, peft: tuple[float | None, bool]) -> LoRA:
    """A module's change, of which `weight` times is tried on the layer."""
    original = layer.weight.detach()
    rank = len(parts["down"])
    alpha, root = (float(parts["alpha"].flatten()[0]), False) if "alpha" in parts else peft
    magnitude = parts.get("dora_scale")
    if "magnitude" in parts:  # PEFT's: one for each output, in several shapes
        magnitude = parts["magnitude"].flatten()[:, None]
    # In a number format that holds the file's as well as the model's numbers.
    up, down, mid, magnitude = (
        None
        if tensor is None
        else tensor.to(original.device, torch.promote_types(original.dtype, tensor.dtype))
        for tensor in (parts["up"], parts["down"], parts.get("mid"), magnitude)
    )
    assert up is not None and down is not None
    scale = 1.0 if alpha is None else alpha / (rank**0.5 if root else rank)
    lora = LoRA(up, down, mid=mid, scale=scale, magnitude=magnitude)
    try:
        new = lora.merged(original.to(torch.promote_types(original.dtype, torch.float32)), weight)
    except (RuntimeError, ValueError, IndexError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"the matrices of {name} do not fit the model's ({reason})") from None
    if not torch.isfinite(new.to(original.dtype)).all():
        raise InputError(f"{name} would make the weights infinite: is its weight or the file wrong?")
    return lora
