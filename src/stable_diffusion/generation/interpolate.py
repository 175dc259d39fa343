"""Between two noises, and between two prompts."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from stable_diffusion.nn.text import PromptEmbeds

_PARALLEL = 1e-6
"""Sine of the angle below which an arc is a line."""


def slerp(
    noise: Float[Tensor, "b c h w"], other: Float[Tensor, "b c h w"], strength: float
) -> Float[Tensor, "b c h w"]:
    """The point at `strength` of the way, 0 to 1, on the arc from one noise to another, each picture's on its own.

    Spherical linear interpolation (Shoemake 1985). On a line between them the noise would be too small in the middle,
    where hardly any of a normal distribution lies (White 2016).
    """
    ends = [x.flatten(1).double() for x in (noise, other)]
    lengths = [x.norm(dim=1) for x in ends]
    angle = ((ends[0] * ends[1]).sum(dim=1) / (lengths[0] * lengths[1])).clamp(-1, 1).acos()  # b

    def weight(part: float) -> Float[Tensor, "b 1 1 1"]:
        on_arc = (part * angle).sin() / angle.sin()
        return torch.where(angle.sin() > _PARALLEL, on_arc, part)[:, None, None, None]

    return (weight(1 - strength) * noise + weight(strength) * other).to(noise.dtype)


def mixed(embeds: PromptEmbeds, other: PromptEmbeds, strength: float) -> PromptEmbeds:
    """The embeddings at `strength` of the way, 0 to 1, on the line between those of two prompts, token by token.

    On a line, since keys and values are linear in the tokens, and so mixed in the same parts; an arc gave the same
    pictures. Where one prompt is shorter, its last token stands in for those that it lacks: with its padding, which the
    other one's mask lets through, 3 % of another prompt made another picture.
    """
    mask = None if embeds.mask is None or other.mask is None else embeds.mask | other.mask
    tokens = torch.lerp(_filled(embeds), _filled(other), strength)
    return PromptEmbeds(tokens, mask, torch.lerp(embeds.pooled, other.pooled, strength))


def _filled(embeds: PromptEmbeds) -> Float[Tensor, "b n d"]:
    """The tokens, with the one before it in place of each that may not be attended to."""
    tokens, mask, _ = embeds
    if mask is None:
        return tokens
    places = torch.arange(mask.shape[1], device=mask.device) * mask  # b n
    last = places.cummax(dim=1).values
    return tokens.gather(1, last[..., None].expand_as(tokens))
