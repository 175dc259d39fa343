"""Text encoders: one transformer for CLIP and BERT, and the prompt encoder that joins several of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from stable_diffusion.config import TextEncoderConfig
from stable_diffusion.errors import InputError
from stable_diffusion.nn.blocks import Placed, attend, embedding
from stable_diffusion.nn.tokenizer import TokenBatch, Tokenizer

BERT_NAMES = (
    # BERT's published names, and ours, which are CLIP's. A name contains either side of a row at most once.
    ("embeddings.word_embeddings.", "embeddings.token_embedding."),
    ("embeddings.position_embeddings.", "embeddings.position_embedding."),
    ("embeddings.token_type_embeddings.", "embeddings.token_type_embedding."),
    ("embeddings.LayerNorm.", "embeddings.layer_norm."),
    ("encoder.layer.", "encoder.layers."),
    (".attention.self.query.", ".self_attn.q_proj."),
    (".attention.self.key.", ".self_attn.k_proj."),
    (".attention.self.value.", ".self_attn.v_proj."),
    (".attention.output.dense.", ".self_attn.out_proj."),
    (".attention.output.LayerNorm.", ".layer_norm1."),
    (".intermediate.dense.", ".mlp.fc1."),
    (".output.dense.", ".mlp.fc2."),
    (".output.LayerNorm.", ".layer_norm2."),
)


class _Embeddings(nn.Module):
    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        width = config.hidden_size
        bert = config.architecture == "bert"
        self.token_embedding = embedding(config.vocab_size, width)
        self.position_embedding = embedding(config.max_position_embeddings, width)
        self.token_type_embedding = embedding(2, width) if bert else None
        self.layer_norm = nn.LayerNorm(width, config.layer_norm_eps) if bert else None

    def forward(self, input_ids: Int[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        x = self.token_embedding(input_ids) + self.position_embedding.weight[: input_ids.shape[1]]
        if self.token_type_embedding is not None and self.layer_norm is not None:
            x = self.layer_norm(x + self.token_type_embedding.weight[0])  # prompts are one segment
        return x


class _SelfAttention(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(
        self, x: Float[Tensor, "b n d"], mask: Bool[Tensor, "b n"] | None, causal: bool
    ) -> Float[Tensor, "b n d"]:
        query, key, value = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.out_proj(attend(query, key, value, num_heads=self.num_heads, mask=mask, causal=causal))


class _FeedForward(nn.Module):
    def __init__(self, width: int, inner: int, act: str) -> None:
        super().__init__()
        self.act = act
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        x = self.fc1(x)
        return self.fc2(F.gelu(x) if self.act == "gelu" else x * torch.sigmoid(1.702 * x))


class _Layer(nn.Module):
    """Self-attention and feed-forward: CLIP is pre-norm, BERT post-norm."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.clip = config.architecture == "clip"
        self.self_attn = _SelfAttention(width, config.num_attention_heads)
        self.layer_norm1 = nn.LayerNorm(width, config.layer_norm_eps)
        self.mlp = _FeedForward(width, config.intermediate_size, config.hidden_act)
        self.layer_norm2 = nn.LayerNorm(width, config.layer_norm_eps)

    def forward(self, x: Float[Tensor, "b n d"], mask: Bool[Tensor, "b n"] | None) -> Float[Tensor, "b n d"]:
        if self.clip:
            x = x + self.self_attn(self.layer_norm1(x), mask, causal=True)
            return x + self.mlp(self.layer_norm2(x))
        x = self.layer_norm1(x + self.self_attn(x, mask, causal=False))
        return self.layer_norm2(x + self.mlp(x))


class _Layers(nn.Module):
    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList([_Layer(config) for _ in range(config.num_hidden_layers)])


class TextEncoder(Placed):
    """CLIP's text transformer (Radford et al. 2021) or BERT (Devlin et al. 2018), under CLIP's names."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = _Embeddings(config)
        self.encoder = _Layers(config)
        clip = config.architecture == "clip"
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps) if clip else None

    def forward(
        self, input_ids: Int[Tensor, "b n"], attention_mask: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b n d"]:
        """The tokens' hidden states. `attention_mask` is True at real tokens; None attends to padding too."""
        x = self.embeddings(input_ids)
        for layer in self.encoder.layers[: self.config.num_hidden_layers - self.config.skip_last_layers]:
            x = layer(x, attention_mask)
        return x if self.final_layer_norm is None else self.final_layer_norm(x)


class PromptEmbeds(NamedTuple):
    """A batch of prompts as the U-Net reads it."""

    tokens: Float[Tensor, "b n d"]
    mask: Bool[Tensor, "b n"] | None
    """True where a token may be attended to; None for all, padding included, as in Stable Diffusion."""
    pooled: Float[Tensor, "b p"]
    """One vector a prompt: CLIP's state at the end token, the mean of BERT's; of several encoders, concatenated."""

    def to(self, *args: torch.device | torch.dtype) -> PromptEmbeds:
        """The same on another device or in another floating-point type; the mask stays boolean."""
        tokens, mask, pooled = self
        for target in args:
            tokens, pooled = tokens.to(target), pooled.to(target)
        return PromptEmbeds(tokens, None if mask is None else mask.to(tokens.device), pooled)

    def __add__(self, other: object) -> PromptEmbeds:
        """The prompts of two batches as one batch."""
        if not isinstance(other, PromptEmbeds):
            return NotImplemented
        mask = None if self.mask is None or other.mask is None else torch.cat([self.mask, other.mask])
        tokens, pooled = torch.cat([self.tokens, other.tokens]), torch.cat([self.pooled, other.pooled])
        return PromptEmbeds(tokens, mask, pooled)


def mean_of(tokens: Float[Tensor, "b n d"], mask: Bool[Tensor, "b n"]) -> Float[Tensor, "b d"]:
    """The mean of each prompt's real tokens."""
    real = mask[..., None].to(tokens.dtype)
    return (tokens * real).sum(dim=1) / real.sum(dim=1)


class PromptEncoder(nn.Module):
    """Texts to tokens, by one text encoder or by several (CLIP and BERT together, say).

    Each encoder's tokens are projected to the U-Net's width, unless a single encoder has it already, and
    concatenated along the sequence. A U-Net of width 0 reads none of them, but only the pooled vectors.
    """

    def __init__(
        self, configs: tuple[TextEncoderConfig, ...], tokenizers: list[Tokenizer], width: int
    ) -> None:
        super().__init__()
        assert len(configs) == len(tokenizers), "one tokenizer an encoder"
        for config, tokenizer in zip(configs, tokenizers, strict=True):
            if config.vocab_size < tokenizer.size:
                raise InputError(
                    f"the tokenizer in {tokenizer.folder} needs a vocab_size of {tokenizer.size}, but the text encoder"
                    f" has {config.vocab_size}: the two are of different models, copy or download them again"
                )
        self.width = width
        self.configs = configs
        self.tokenizers = tokenizers
        self.encoders = nn.ModuleList([TextEncoder(config) for config in configs])
        single = len(configs) == 1 and configs[0].hidden_size == width
        projected = () if single or not width else configs
        self.projections = nn.ModuleList([nn.Linear(config.hidden_size, width) for config in projected])
        for encoder, config in zip(self.encoders, configs, strict=True):
            encoder.requires_grad_(config.trainable)

    def forward(self, texts: list[str]) -> PromptEmbeds:
        """The embeddings of the texts. Text beyond an encoder's context is truncated silently here."""
        return self.embed(self.tokenize(texts), len(texts))

    def tokenize(self, texts: list[str]) -> list[TokenBatch]:
        """Each encoder's tokens of the texts, and what its context has no room for."""
        return [tokenizer(texts) for tokenizer in self.tokenizers]

    def embed(self, batches: list[TokenBatch], count: int) -> PromptEmbeds:
        """The embeddings of `count` texts that ``tokenize`` gave the tokens of."""
        if not self.encoders:  # a model without text: tokens of no length
            tokens = torch.empty(count, 0, 0, device="cpu")
            return PromptEmbeds(tokens, None, tokens.flatten(1))
        read = [self.read(i, batch.input_ids, batch.attention_mask) for i, batch in enumerate(batches)]
        return self.join(read)

    def encode(self, index: int, texts: list[str]) -> PromptEmbeds:
        """One encoder's states for the texts, before the projection: what training caches of a frozen encoder."""
        batch = self.tokenizers[index](texts)
        return self.read(index, batch.input_ids, batch.attention_mask)

    def read(
        self, index: int, input_ids: Int[Tensor, "b n"], attention_mask: Bool[Tensor, "b n"]
    ) -> PromptEmbeds:
        """One encoder's states for token ids, before the projection."""
        encoder = self.encoders[index]
        assert isinstance(encoder, TextEncoder)
        input_ids, attention_mask = input_ids.to(encoder.device), attention_mask.to(encoder.device)
        if not self.configs[index].reads_padding:
            tokens = encoder(input_ids, attention_mask)
            return PromptEmbeds(tokens, attention_mask, mean_of(tokens, attention_mask))
        tokens = encoder(input_ids)
        rows = torch.arange(len(tokens), device=tokens.device)
        end_id = self.tokenizers[index].end_id
        assert end_id is not None, "a tokenizer knows its special tokens"
        first = (input_ids == end_id).int().argmax(dim=1)  # padding may repeat the end
        return PromptEmbeds(tokens, None, tokens[rows, first])

    def join(self, parts: list[PromptEmbeds]) -> PromptEmbeds:
        """The encoders' embeddings, projected and concatenated; with a mask only if some encoder has one."""
        tokens = [part.tokens for part in parts]
        pooled = torch.cat([part.pooled for part in parts], dim=1)
        if not self.width:
            return PromptEmbeds(pooled.new_empty(len(pooled), 0, 0), None, pooled)
        if self.projections:
            tokens = [project(x) for project, x in zip(self.projections, tokens, strict=True)]
        masks = [
            x.new_ones(x.shape[:2], dtype=torch.bool) if part.mask is None else part.mask
            for part, x in zip(parts, tokens, strict=True)
        ]
        mask = torch.cat(masks, dim=1) if any(part.mask is not None for part in parts) else None
        return PromptEmbeds(torch.cat(tokens, dim=1), mask, pooled)
