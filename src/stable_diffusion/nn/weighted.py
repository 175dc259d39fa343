"""Prompts whose words have weights, and that may be longer than a context, as AUTOMATIC1111's webui encodes them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stable_diffusion.nn.text import PromptEmbeds, PromptEncoder, mean_of
from stable_diffusion.nn.tokenizer import Tokenizer

Prompt = Sequence[Sequence[tuple[str, float]]]
"""Parts, each of words with their weights; CLIP reads each part in contexts of its own."""

MOST = 32
"""Contexts that a prompt may have: 2,400 tokens of Stable Diffusion. Each makes every step slower."""
BACK = 20
"""Tokens at a chunk's end among which it may end at a comma: the webui's own value."""
SMALLEST_MEAN = 0.05
"""Share of the mean magnitude below which a mean is an accident of signs: MiniLM's states have 0.001 to 0.04, and the
ratio of two such means, for "a (fox:1.3), noto style", is 3."""


class Token(NamedTuple):
    """A token of a prompt: its id, its weight, and where in the prompt's words it begins."""

    id: int
    weight: float
    start: int


class WeightedBatch(NamedTuple):
    """An encoder's tokens of a batch of prompts, each of `k` contexts of `n` tokens."""

    input_ids: Int[Tensor, "b k n"]
    attention_mask: Bool[Tensor, "b k n"]
    weights: Float[Tensor, "b k n"]
    """1 for begin, end and padding."""
    own: Bool[Tensor, "b k"]
    """False for the empty contexts at the end that make all prompts equally long."""
    cut: list[str]
    """The words of each prompt that are left out."""


def tokenize(text_encoder: PromptEncoder, prompts: Sequence[Prompt]) -> list[WeightedBatch]:
    """Each encoder's tokens of the prompts: for CLIP in up to ``MOST`` chunks, for BERT in one context."""
    batches = []
    for config, tokenizer in zip(text_encoder.configs, text_encoder.tokenizers, strict=True):
        room = tokenizer.context_length - 2
        comma = tokenizer.tokens([","])[0][0][0]
        chunked, cut = [], []
        for prompt in prompts:
            parts, words = _tokens(tokenizer, prompt)
            if config.architecture == "clip":
                found = [chunk for part in parts for chunk in chunks(part, room, comma)]
                kept, left = found[:MOST], [token for chunk in found[MOST:] for token in chunk]
            else:
                row = [token for part in parts for token in part]
                kept, left = [row[:room]], row[room:]
            chunked.append(kept)
            cut.append(words[left[0].start :] if left else "")
        batches.append(_batch(tokenizer, chunked, cut))
    return batches


def embed(text_encoder: PromptEncoder, batches: Sequence[WeightedBatch], count: int) -> PromptEmbeds:
    """The embeddings of `count` prompts that ``tokenize`` gave the tokens of: their contexts, one after the other.

    The pooled vector of CLIP is the mean of the contexts' own, which weights leave as they are; that of BERT is the
    mean of the weighted tokens.
    """
    if not batches:
        return text_encoder.embed([], count)
    parts = []
    for i, batch in enumerate(batches):
        read = text_encoder.read(i, batch.input_ids.flatten(0, 1), batch.attention_mask.flatten(0, 1))
        tokens = emphasised(read.tokens, batch.weights.flatten(0, 1), read.mask)
        pooled = read.pooled if read.mask is None else mean_of(tokens, read.mask)
        own = batch.own.to(pooled.device)
        pooled = mean_of(pooled.unflatten(0, own.shape), own)
        mask = None if read.mask is None else read.mask.reshape(count, -1)
        parts.append(PromptEmbeds(tokens.reshape(count, -1, tokens.shape[-1]), mask, pooled))
    return text_encoder.join(parts)


def emphasised(
    states: Float[Tensor, "b n d"], weights: Float[Tensor, "b n"], mask: Bool[Tensor, "b n"] | None
) -> Float[Tensor, "b n d"]:
    """States times their weights, scaled so that each context's mean is what it was, as the webui does for CLIP.

    Where a mean is next to nothing, as after BERT's last normalisation, its ratio would be an accident: there the mean
    magnitude is kept. A context whose weights are all 1 stays as it is, bit for bit.
    """
    wide = states.to(torch.promote_types(states.dtype, torch.float32))
    weights = weights.to(wide.dtype).to(wide.device)
    real = torch.ones_like(weights) if mask is None else mask.to(wide.dtype)
    changed = wide * weights[..., None]

    def mean(x: Float[Tensor, "b n d"]) -> Float[Tensor, " b"]:
        return (x.mean(-1) * real).sum(-1) / real.sum(-1)

    old, new, size, new_size = mean(wide), mean(changed), mean(wide.abs()), mean(changed.abs())
    clear = torch.minimum(old.abs() / size, new.abs() / new_size) > SMALLEST_MEAN
    ratio = torch.where(clear & (old * new > 0), old / new, size / new_size)
    plain = (weights == 1).all(-1)
    return torch.where(plain[:, None, None], states, (changed * ratio[:, None, None]).to(states.dtype))


def chunks(tokens: list[Token], room: int, comma: int) -> Iterator[list[Token]]:
    """Cuts tokens into chunks of at most `room`, at least one, as the webui does.

    A chunk ends after the last comma among its last tokens where there is one, unless the next token is a comma. No
    cut parts a character's tokens or those of a textual inversion, unless there is no other place.
    """
    back = min(BACK, room // 2)  # half of a small model's context
    while len(tokens) > room:
        end = room
        if tokens[room].id != comma:
            end = next((i for i in range(room, room - back, -1) if tokens[i - 1].id == comma), room)
        while end and tokens[end].start == tokens[end - 1].start:
            end -= 1
        end = end or room
        yield tokens[:end]
        tokens = tokens[end:]
    yield tokens


def _tokens(tokenizer: Tokenizer, prompt: Prompt) -> tuple[list[list[Token]], str]:
    """The tokens of a prompt's parts, each piece read by itself, and its words."""
    parts, words = [], ""
    for part in prompt:
        words += " " if words else ""
        row = []
        for (text, weight), found in zip(part, tokenizer.tokens([text for text, _ in part]), strict=True):
            row += [Token(i, weight, len(words) + start) for i, start in found]
            words += text
        parts.append(row)
    return parts, words


def _batch(tokenizer: Tokenizer, prompts: list[list[list[Token]]], cut: list[str]) -> WeightedBatch:
    """Prompts of contexts as tensors, with empty contexts up to the longest prompt's number."""
    most = max(len(contexts) for contexts in prompts)
    rows = [row for contexts in prompts for row in [*contexts, *[[]] * (most - len(contexts))]]
    ids, mask, _ = tokenizer.batch([[token.id for token in row] for row in rows], [])
    weights = torch.ones(ids.shape, dtype=torch.float64, device="cpu")
    for place, row in zip(weights, rows, strict=True):
        place[1 : len(row) + 1] = torch.tensor(
            [token.weight for token in row], dtype=place.dtype, device="cpu"
        )
    counts = torch.tensor([[len(contexts)] for contexts in prompts], device="cpu")
    own = torch.arange(most, device="cpu") < counts
    shape = (len(prompts), most)
    return WeightedBatch(
        ids.unflatten(0, shape), mask.unflatten(0, shape), weights.unflatten(0, shape), own, cut
    )
