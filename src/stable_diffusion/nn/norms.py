"""Group normalisation whose training is fast on a CPU in channels_last, PyTorch's memory format for convolutions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# From here PyTorch's kernel is the faster one.
KERNEL_PIXELS = 1024
KERNEL_CHANNELS = 16


class GroupNorm(nn.GroupNorm):
    """PyTorch's, but for training on a CPU in channels_last with small pictures and groups of few channels.

    Below `KERNEL_PIXELS` its kernel takes each group's channels apart, too few for the processor's vectors. Written
    out, forward and backward are sums over whole rows of channels (benchmarks/LOG.md).
    """

    def forward(self, x: Float[Tensor, "b c *n"]) -> Float[Tensor, "b c *n"]:
        if (
            x.requires_grad
            and x.device.type == "cpu"
            and x.ndim == 4
            and x.is_contiguous(memory_format=torch.channels_last)
            and x.shape[2] * x.shape[3] < KERNEL_PIXELS
            and self.num_channels // self.num_groups < KERNEL_CHANNELS
        ):
            apply: Callable[..., Tensor] = _RowsGroupNorm.apply  # untyped in torch
            return apply(x, self.weight, self.bias, self.num_groups, self.eps)
        return super().forward(x)


class _RowsGroupNorm(torch.autograd.Function):
    """Group normalisation of rows of channels, in float32 at least: y = scale x + shift (Wu & He 2018, equation 1)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        wide = _rows(x)
        means = _by_group(torch.stack([wide.mean(dim=1), wide.square().mean(dim=1)]), groups).mean(dim=-1)
        mean, rstd = means[0], (means[1] - means[0].square()).clamp_min(0).add(eps).rsqrt()  # b g
        scale = (rstd[..., None] * _by_group(weight, groups)).flatten(1)  # b c
        shift = bias - (mean[..., None] * _by_group(scale, groups)).flatten(1)
        ctx.save_for_backward(x, weight, mean, rstd)
        return _like(torch.addcmul(shift[:, None], wide, scale[:, None]), x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x, weight, mean, rstd = ctx.saved_tensors
        groups = mean.shape[1]
        rows, wide = _rows(grad), _rows(x)
        sums = _by_group(torch.stack([rows.sum(dim=1), (rows * wide).sum(dim=1)]), groups)  # 2 b g d
        gamma, mean, rstd = _by_group(weight, groups), mean[..., None], rstd[..., None]
        # The mean over a group of the gradient with respect to the normalised values, and of their product with x.
        first, second = (sums * gamma).mean(dim=-1, keepdim=True) / wide.shape[1]
        slope = (mean * first - second) * rstd**3
        offset = -slope * mean - first * rstd
        factors = [
            factor.expand(-1, -1, gamma.shape[-1]).flatten(1)[:, None]
            for factor in (rstd * gamma, slope, offset)
        ]
        changed = torch.addcmul(factors[2], wide, factors[1]).addcmul_(rows, factors[0])
        weights = ((sums[1] - mean * sums[0]) * rstd).sum(dim=0).flatten()
        return _like(changed, x), weights.to(weight), sums[0].sum(dim=0).flatten().to(weight), None, None


def _rows(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n c"]:
    """A picture's pixels, one row of channels each, in float32 or wider."""
    return x.permute(0, 2, 3, 1).flatten(1, 2).to(torch.promote_types(x.dtype, torch.float32))


def _like(rows: Float[Tensor, "b n c"], x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """The rows as a picture, in channels_last and with the type of `x`."""
    return rows.to(x.dtype).unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)


def _by_group(x: Float[Tensor, "*b c"], groups: int) -> Float[Tensor, "*b g d"]:
    return x.unflatten(-1, (groups, -1))
