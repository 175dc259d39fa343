"""Textual inversions (Gal et al. 2022): words whose vectors were learned, added to CLIP's table and tokenizer."""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from stable_diffusion.checkpoints.families import check_width, lora_part
from stable_diffusion.checkpoints.files import State, read_weights
from stable_diffusion.config import ModelConfig
from stable_diffusion.errors import InputError
from stable_diffusion.nn.text import PromptEncoder, TextEncoder


class ExtendedEmbedding(nn.Embedding):
    """An embedding table with rows at its end that its state does not hold, so a saved model stays as published."""

    added: Tensor

    def __init__(self, table: nn.Embedding, added: Float[Tensor, "n d"]) -> None:
        super().__init__(table.num_embeddings, table.embedding_dim, _weight=table.weight.detach())
        self.weight = table.weight
        added = added.to(table.weight)
        if isinstance(table, ExtendedEmbedding):
            added = torch.cat([table.added, added])
        self.register_buffer("added", added, persistent=False)

    def forward(self, ids: Int[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        beyond = ids - self.num_embeddings
        own = F.embedding(ids.clamp(max=self.num_embeddings - 1), self.weight)
        return torch.where(beyond[..., None] < 0, own, F.embedding(beyond.clamp(min=0), self.added))


def add(text: PromptEncoder, config: ModelConfig, path: Path, token: str | None = None) -> list[str]:
    """Adds a file's words to the first CLIP encoder; a word of several vectors stands for all of them in a row.

    Returns the words. `token` replaces the name that the file gives; None keeps it, or takes the file's own name
    where there is none.

    Raises:
        InputError: the file is damaged, not a textual inversion, for another model, or its word is there already.
            Nothing is added then.
    """
    words = read(path, token)
    indices = [i for i, settings in enumerate(config.text_encoders) if settings.architecture == "clip"]
    if not indices:
        raise InputError(f"{path} needs a model with a CLIP text encoder; {config.name!r} has none")
    encoder, tokenizer = text.encoders[indices[0]], text.tokenizers[indices[0]]
    assert isinstance(encoder, TextEncoder)
    width = config.text_encoders[indices[0]].hidden_size
    for vectors in words.values():
        check_width(path, vectors.shape[1], width)
    table = encoder.embeddings.token_embedding
    first = table.num_embeddings + (len(table.added) if isinstance(table, ExtendedEmbedding) else 0)
    rows = itertools.count(first)
    tokenizer.add_tokens({word: [next(rows) for _ in vectors] for word, vectors in words.items()})
    encoder.embeddings.token_embedding = ExtendedEmbedding(table, torch.cat(list(words.values())))
    return list(words)


def read(path: Path, token: str | None = None) -> State:
    """The words of a file with their vectors, one row each.

    Read are AUTOMATIC1111's ``string_to_param``, diffusers' ``{token: vector}``, kohya's ``emb_params`` and a
    bare tensor. Raises InputError as ``add`` does.
    """
    found, _ = read_weights(path)
    if isinstance(found.get("string_to_param"), dict):
        name, found = found.get("name"), dict(found["string_to_param"])
        if len(found) == 1:
            found = {str(name or path.stem): next(iter(found.values()))}
    elif found.keys() & {"clip_g", "clip_l"}:
        raise InputError(f"{path} does not fit: this textual inversion is for SDXL")
    elif found.keys() in ({"emb_params"}, {""}):
        found = {path.stem: next(iter(found.values()))}
    sound = not any(lora_part(str(name)) for name in found) and all(
        isinstance(v, Tensor) and v.is_floating_point() and v.ndim in (1, 2) for v in found.values()
    )
    if not sound or not found or len(found) > 100:
        raise InputError(f"{path} is not a textual inversion: it must hold a vector, or a few, for each word")
    if token is not None:
        if len(found) > 1:
            raise InputError(f"{path} has {len(found)} words, so {token!r} cannot be the name of all")
        found = {token: next(iter(found.values()))}
    words = {}
    for word, vectors in found.items():
        if not str(word).strip():
            raise InputError(f"the word of {path} is empty: give a token")
        if not vectors.numel() or not torch.isfinite(vectors.float()).all():
            raise InputError(f"{path} holds nothing, NaN or infinity for {word!r}: the file is damaged")
        words[str(word)] = torch.atleast_2d(vectors.detach())
    return words
