"""Parity: the written-out group norm is PyTorch's, forward and backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stable_diffusion.nn.norms import GroupNorm


def gradients(y: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Of some function of the output that is not symmetric."""
    return torch.autograd.grad((y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum(), inputs)


@pytest.mark.parametrize("shape", [(3, 32, 5, 7), (1, 16, 1, 1), (2, 24, 8, 8)])
def test_group_norm_in_channels_last(shape: tuple[int, int, int, int]) -> None:
    torch.manual_seed(0)
    norm = GroupNorm(8, shape[1], eps=1e-3, dtype=torch.float64)
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(shape, dtype=torch.float64) * 2 + 3
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    ours, wanted = norm(x), F.group_norm(x, 8, norm.weight, norm.bias, norm.eps)
    assert "RowsGroupNorm" in type(ours.grad_fn).__name__, "PyTorch's was compared with itself"
    assert ours.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(ours, wanted, atol=1e-10, rtol=1e-10)
    parts = (x, norm.weight, norm.bias)
    for one, other in zip(gradients(ours, *parts), gradients(wanted, *parts), strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-10)


def test_group_norm_computes_wide() -> None:
    """In bfloat16 only input and output are rounded: a mean far from 0 costs nothing more."""
    torch.manual_seed(0)
    norm = GroupNorm(4, 16)
    x = (torch.randn(2, 16, 8, 8) + 20).bfloat16().to(memory_format=torch.channels_last).requires_grad_()
    wanted = F.group_norm(x.double(), 4, eps=norm.eps)
    ours = norm(x)
    assert ours.dtype == torch.bfloat16 and norm.weight.dtype == torch.float32
    torch.testing.assert_close(ours.double(), wanted, atol=1e-4, rtol=2**-8)
    (gradient,) = gradients(ours, x)
    assert gradient.dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(1, 16, 32, 32), (1, 64, 8, 8)])
def test_pytorchs_where_it_is_faster(shape: tuple[int, int, int, int]) -> None:
    """Large pictures, and groups of many channels."""
    x = torch.randn(shape).to(memory_format=torch.channels_last).requires_grad_()
    assert "NativeGroupNorm" in type(GroupNorm(4, shape[1])(x).grad_fn).__name__


def test_generating_takes_pytorchs() -> None:
    """Pictures stay bit for bit what they were."""
    x = torch.randn(2, 16, 8, 8).to(memory_format=torch.channels_last)
    norm = GroupNorm(4, 16)
    with torch.no_grad():
        assert torch.equal(norm(x), F.group_norm(x, 4, norm.weight, norm.bias, norm.eps))
