"""The blocks that the U-Net and the autoencoder are made of, under the names of diffusers' tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn

from stable_diffusion.nn.norms import GroupNorm

UNET_NORM_EPS = 1e-5
VAE_NORM_EPS = 1e-6  # also the transformer's entry norm in the U-Net

M = TypeVar("M", bound=nn.Module)

KeysValues = tuple[Float[Tensor, "b m _"], Float[Tensor, "b m _"]]
"""What an attention reads of its context."""


def zero(module: M) -> M:
    """The module with its parameters at 0: a new block starts as the identity, a new network predicts 0."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def weight_bytes(*modules: nn.Module) -> Iterator[UInt8[np.ndarray, " n"]]:
    """The tensors of the modules' states as bytes, for a digest."""
    for module in modules:
        for tensor in module.state_dict().values():
            yield tensor.cpu().contiguous().flatten().view(torch.uint8).numpy()


class Placed(nn.Module):
    """A network that says where it is and in which number format."""

    @property
    def device(self) -> torch.device:
        """Of its first parameter, as `to` moves them together."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Likewise."""
        return next(self.parameters()).dtype


def embedding(count: int, width: int) -> nn.Embedding:
    """A table of vectors with standard deviation 0.02 (Radford et al. 2019).

    On the meta device nothing is sampled: that would import torch's compiler, a second of every start.
    """
    weight = torch.empty(count, width)
    if not weight.is_meta:
        nn.init.normal_(weight, std=0.02)
    return nn.Embedding.from_pretrained(weight, freeze=False)


def timestep_features(timesteps: Float[Tensor, " b"], width: int) -> Float[Tensor, "b width"]:
    """Cosines, then sines, of the timestep at `width` / 2 frequencies from 1 to 1e-4 (Vaswani et al. 2017).

    Computed in float32 whatever the weights' type, as when the published models were trained.
    """
    half = width // 2
    exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    angles = timesteps[:, None].float() * exponent.exp()[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def guidance_features(guidance_scale: Float[Tensor, " b"], width: int) -> Float[Tensor, "b width"]:
    """Sines, then cosines, of 1000 times w at `width` / 2 frequencies from 1 to 1e-4, in float32.

    Luo et al. 2023, section 4.2, whose w is the guidance scale - 1 (Ho & Salimans 2022, equation 6).
    """
    half = width // 2
    exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=guidance_scale.device)
    angles = 1000 * (guidance_scale[:, None].float() - 1) * (exponent / (half - 1)).exp()[None]
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=-1), (0, width % 2))


class TimestepEmbedding(nn.Module):
    """Two linear layers that turn timestep features, or a pooled text vector, into the time embedding.

    With `cond_features` a projection of that many further features is added to the input.
    """

    def __init__(self, in_features: int, width: int, cond_features: int | None = None) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_features, width)
        self.cond_proj = nn.Linear(cond_features, in_features, bias=False) if cond_features else None
        self.linear_2 = nn.Linear(width, width)

    def forward(
        self, features: Float[Tensor, "b f"], condition: Float[Tensor, "b c"] | None = None
    ) -> Float[Tensor, "b width"]:
        if self.cond_proj is not None and condition is not None:
            features = features + self.cond_proj(condition)
        return self.linear_2(F.silu(self.linear_1(features)))


class ResnetBlock(nn.Module):
    """Norm, SiLU, convolution, twice, around a skip; the time embedding, after a SiLU, is added in the middle.

    With `time_width` None it is the autoencoder's block, without a time embedding.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, groups: int, eps: float, time_width: int | None = None
    ) -> None:
        super().__init__()
        self.norm1 = GroupNorm(groups, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_width, out_channels) if time_width else None
        self.norm2 = GroupNorm(groups, out_channels, eps)
        self.conv2 = zero(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(
        self, x: Float[Tensor, "b c h w"], time: Float[Tensor, "b t"] | None = None
    ) -> Float[Tensor, "b c2 h w"]:
        hidden = self.conv1(F.silu(self.norm1(x)))
        if self.time_emb_proj is not None and time is not None:
            hidden = hidden + self.time_emb_proj(time)[:, :, None, None]
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        return hidden + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Downsample(nn.Module):
    """Halves height and width with a strided convolution.

    `asymmetric` pads right and bottom only, as Stable Diffusion's autoencoder does.
    """

    def __init__(self, channels: int, *, asymmetric: bool = False) -> None:
        super().__init__()
        self.asymmetric = asymmetric
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if asymmetric else 1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.asymmetric else x)


class Upsample(nn.Module):
    """Resizes to `size`, or doubles height and width, by nearest neighbours; then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(
        self, x: Float[Tensor, "b c h w"], size: tuple[int, int] | None = None
    ) -> Float[Tensor, "b c h2 w2"]:
        return self.conv(F.interpolate(x, size or (2 * x.shape[-2], 2 * x.shape[-1]), mode="nearest"))


def attend(
    query: Float[Tensor, "b n d"],
    key: Float[Tensor, "b m d"],
    value: Float[Tensor, "b m d"],
    *,
    num_heads: int,
    mask: Bool[Tensor, "b m"] | None = None,
    causal: bool = False,
    upcast: bool = False,
) -> Float[Tensor, "b n d"]:
    """Scaled dot-product attention over `num_heads` heads. `mask` is True where a key may be attended to."""
    dtype = query.dtype
    # b head n d
    query, key, value = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (query, key, value))
    if upcast:
        wide = torch.promote_types(dtype, torch.float32)  # float64 stays
        query, key, value = query.to(wide), key.to(wide), value.to(wide)
    attn_mask = None if mask is None else mask[:, None, None, :]
    if attn_mask is not None and causal:
        length = query.shape[2]
        attn_mask = attn_mask & torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
        causal = False
    if query.requires_grad and query.device.type == "cpu" and not causal:
        # Written out, since the fused kernel's backward pass is slow on a CPU (benchmarks/LOG.md).
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -torch.inf)
        out = scores.softmax(dim=-1) @ value
    else:
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, is_causal=causal)
    return out.transpose(1, 2).flatten(2).to(dtype)


class Attention(nn.Module):
    """Self-attention, or cross-attention where the context's keys and values are given.

    `groups` adds the group norm in front and the residual that the autoencoder's attention has.
    """

    def __init__(
        self,
        channels: int,
        *,
        num_heads: int,
        context_width: int | None = None,
        bias: bool = False,
        groups: int | None = None,
        upcast: bool = False,
    ) -> None:
        super().__init__()
        context_width = context_width or channels
        self.num_heads = num_heads
        self.upcast = upcast
        self.group_norm = GroupNorm(groups, channels, VAE_NORM_EPS) if groups else None
        self.to_q = nn.Linear(channels, channels, bias=bias)
        self.to_k = nn.Linear(context_width, channels, bias=bias)
        self.to_v = nn.Linear(context_width, channels, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def keys_values(self, context: Float[Tensor, "b m d"]) -> KeysValues:
        """What ``forward`` reads of a context: the same at every step of a walk."""
        return self.to_k(context), self.to_v(context)

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        context: KeysValues | None = None,
        mask: Bool[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b n c"]:
        normed = x if self.group_norm is None else self.group_norm(x.transpose(1, 2)).transpose(1, 2)
        query = self.to_q(normed)
        key, value = self.keys_values(normed) if context is None else context
        out = attend(query, key, value, num_heads=self.num_heads, mask=mask, upcast=self.upcast)
        out = self.to_out[0](out)
        return out if self.group_norm is None else x + out


class GatedFeedForward(nn.Module):
    """GEGLU (Shazeer 2020): a linear layer whose first half is gated by the second, then a linear layer."""

    class GEGLU(nn.Module):
        def __init__(self, channels: int, inner: int) -> None:
            super().__init__()
            self.proj = nn.Linear(channels, 2 * inner)

        def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n inner"]:
            value, gate = self.proj(x).chunk(2, dim=-1)
            return value * F.gelu(gate)

    def __init__(self, channels: int) -> None:
        super().__init__()
        gated, out = self.GEGLU(channels, 4 * channels), nn.Linear(4 * channels, channels)
        self.net = nn.ModuleList([gated, nn.Identity(), out])  # published names have a gap: dropout

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        return self.net[2](self.net[0](x))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text if there is any, feed-forward; each pre-norm and residual."""

    def __init__(self, channels: int, *, num_heads: int, context_width: int | None, upcast: bool) -> None:
        super().__init__()
        attention = partial(Attention, channels, num_heads=num_heads, upcast=upcast)
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = attention()
        self.norm2 = nn.LayerNorm(channels) if context_width else None
        self.attn2 = attention(context_width=context_width) if context_width else None
        self.norm3 = nn.LayerNorm(channels)
        self.ff = GatedFeedForward(channels)

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        context: KeysValues | None,
        mask: Bool[Tensor, "b m"] | None,
    ) -> Float[Tensor, "b n c"]:
        x = x + self.attn1(self.norm1(x))
        if self.attn2 is not None and self.norm2 is not None:
            x = x + self.attn2(self.norm2(x), context, mask)
        return x + self.ff(self.norm3(x))


class PerPixel(nn.Conv2d):
    """A 1x1 convolution of tokens: a linear layer whose weight has two more axes."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 1)

    def forward(self, tokens: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        return F.linear(tokens, self.weight.flatten(1), self.bias)


class SpatialTransformer(nn.Module):
    """A transformer block over the pixels of a feature map, around a skip."""

    def __init__(
        self,
        channels: int,
        *,
        num_heads: int,
        context_width: int | None,
        groups: int,
        linear: bool,
        upcast: bool,
    ) -> None:
        super().__init__()
        self.norm = GroupNorm(groups, channels, VAE_NORM_EPS)
        self.proj_in = nn.Linear(channels, channels) if linear else PerPixel(channels)
        self.transformer_blocks = nn.ModuleList(
            [TransformerBlock(channels, num_heads=num_heads, context_width=context_width, upcast=upcast)]
        )
        self.proj_out = zero(nn.Linear(channels, channels) if linear else PerPixel(channels))

    def keys_values(self, text: Float[Tensor, "b m d"]) -> KeysValues | None:
        """What its cross-attention reads of text tokens; None where it has none."""
        (block,) = self.transformer_blocks
        assert isinstance(block, TransformerBlock)
        return None if block.attn2 is None else block.attn2.keys_values(text)

    def forward(
        self,
        x: Float[Tensor, "b c h w"],
        context: KeysValues | None,
        mask: Bool[Tensor, "b m"] | None,
    ) -> Float[Tensor, "b c h w"]:
        tokens = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))  # b hw c
        for block in self.transformer_blocks:
            tokens = block(tokens, context, mask)
        return x + self.proj_out(tokens).transpose(1, 2).unflatten(2, x.shape[-2:])
