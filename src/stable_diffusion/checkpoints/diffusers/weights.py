"""The files of weights in diffusers' folders: variants, shards, and older names of tensors."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from stable_diffusion.checkpoints.files import State, read_tensors
from stable_diffusion.errors import InputError, three_of
from stable_diffusion.files import read_json

WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
"""Each part's file of weights, without suffix; a text encoder's .bin is called pytorch_model."""

# The autoencoder's attention in files of before 2023, and today's names.
VAE_ATTENTION_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


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


def has_variant(folder: Path, variant: str) -> bool:
    """Whether a part of the pipeline has a file of that variant."""
    return any(f".{variant}" in name for part in WEIGHTS for name in names_in(folder / part))


def read_part(folder: Path, stem: str, variant: str | None) -> State:
    """The tensors of a part."""
    names = names_in(folder)
    chosen = choose_weights(names, stem, variant)
    if not chosen:
        there = variants_there(folder.parent)
        raise InputError(f"{folder} has no weights, neither {stem}.safetensors nor a .bin: {there}")
    if not chosen[0].endswith(".json"):
        return read_tensors(folder / chosen[0])
    places = read_json(folder / chosen[0]).get("weight_map")
    if not isinstance(places, dict) or not all(
        isinstance(file, str) and file and Path(file).name == file and "\\" not in file
        for file in places.values()
    ):
        raise InputError(f"{folder / chosen[0]}: weight_map must give the file of each tensor beside it")
    state: State = {}
    for file in sorted(set(places.values())):
        state |= read_tensors(folder / file)
    if absent := sorted(places.keys() - state.keys()):
        raise InputError(
            f"{folder}: {len(absent)} of {len(places)} tensors are in no shard ({three_of(absent)}):"
            " copy or download it again"
        )
    return state


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


def names_in(folder: Path) -> set[str]:
    """The names in a folder; empty where the folder does not exist."""
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def variants_there(folder: Path) -> str:
    """What to do where a folder lacks files: take a variant that it has, or the whole folder."""
    pattern = re.compile(r"(?:diffusion_pytorch_model|model|pytorch_model)\.(\w+)\.(?:safetensors|bin)")
    files = (match for part in WEIGHTS for match in map(pattern.fullmatch, names_in(folder / part)))
    there = sorted({match[1] for match in files if match})
    return f"the variants there are {', '.join(there)}" if there else "copy or download the folder whole"
