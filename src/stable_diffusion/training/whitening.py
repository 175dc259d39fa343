"""Frozen text embeddings in coordinates of mean 0 and covariance 1, in which a network learns words sooner.

A text encoder's vectors lie in a narrow cone: what they share is large, what tells a fox from a dog is small, and
gradients follow what is large. So the denoiser trains in whitened coordinates (LeCun et al. 1998, "Efficient
BackProp", section 4.3), and its first layers take the change over afterwards: the same function, of what the
encoder says.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from stable_diffusion.nn.blocks import TimestepEmbedding, TransformerBlock
from stable_diffusion.nn.text import PromptEncoder
from stable_diffusion.nn.unet import UNet

FLOOR = 0.01  # added to every direction's variance, in their mean: what hardly varies is no word


class Affine(NamedTuple):
    """A change of coordinates: x becomes (x - mean) @ matrix."""

    mean: Float[Tensor, " d"]
    matrix: Float[Tensor, "d d"]

    def __call__(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        return (x - self.mean.to(x)) @ self.matrix.to(x)

    def inverse(self) -> Affine:
        """The way back."""
        return Affine(-self.mean @ self.matrix, torch.linalg.inv(self.matrix))


class TextAffine(NamedTuple):
    """What one encoder's embeddings are changed by."""

    tokens: Affine
    pooled: Affine

    def inverse(self) -> TextAffine:
        """The way back."""
        return TextAffine(self.tokens.inverse(), self.pooled.inverse())


def whitening(rows: Float[Tensor, "n d"]) -> Affine:
    """The change after which the rows have mean 0 and, but for the floor, covariance 1, in float64.

    Of all such changes the symmetric one, C^(-1/2) (Kessy et al. 2018, "Optimal whitening and decorrelation"): it
    follows the rows continuously, where the signs of eigenvectors turn with the last digit. So a run goes on from what
    another number of threads, or another machine, measures.
    """
    rows = rows.double()
    variances, directions = torch.linalg.eigh(torch.cov(rows.T))
    scales = (variances + FLOOR * variances.mean()).rsqrt()
    return Affine(rows.mean(0), directions * scales @ directions.T)


@contextmanager
def whitened(unet: UNet, text_encoder: PromptEncoder, changes: Sequence[TextAffine | None]) -> Iterator[None]:
    """Within it the U-Net and the projections compute what they did before, from changed embeddings.

    Args:
        unet: reads the embeddings; changed in place, and back at the end.
        text_encoder: its projections are what reads the tokens, where it has any.
        changes: of each encoder's embeddings; None for those that stay.
    """
    _change(unet, text_encoder, changes)
    try:
        yield
    finally:
        _change(unet, text_encoder, [None if change is None else change.inverse() for change in changes])


@torch.no_grad()
def _change(unet: UNet, text_encoder: PromptEncoder, changes: Sequence[TextAffine | None]) -> None:
    first = 0  # column of the joined pooled vectors
    for i, (config, change) in enumerate(zip(text_encoder.configs, changes, strict=True)):
        columns = slice(first, first + config.hidden_size)
        first = columns.stop
        if change is None:
            continue
        pooled = unet.class_embedding
        if unet.config.pooled_projection_dim is not None and isinstance(pooled, TimestepEmbedding):
            pooled.linear_1.bias.add_(_read_from(pooled.linear_1.weight[:, columns], change.pooled))
        if text_encoder.projections:
            projection = text_encoder.projections[i]
            assert isinstance(projection, nn.Linear)
            projection.bias.add_(_read_from(projection.weight, change.tokens))
            continue
        for block in unet.modules():
            if isinstance(block, TransformerBlock) and block.attn2 is not None:
                # What is added to all keys alike leaves their softmax as it is; to all values, the output moves.
                _read_from(block.attn2.to_k.weight, change.tokens)
                shift = _read_from(block.attn2.to_v.weight, change.tokens)
                out = block.attn2.to_out[0]
                assert isinstance(out, nn.Linear)
                out.bias.add_(out.weight @ shift)


def _read_from(weight: Tensor, change: Affine) -> Tensor:
    """Makes a linear layer's weight read changed inputs, and returns what its bias has to gain for that."""
    mean, inverse = change.mean.to(weight.device), torch.linalg.inv(change.matrix).to(weight.device)
    shift = (weight.double() @ mean).to(weight.dtype)
    weight.copy_(weight.double() @ inverse.T)
    return shift
