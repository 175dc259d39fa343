"""Random weights under which text, guidance and steps change the picture; fresh ones hardly move it."""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


@torch.no_grad()
def lively(module: M, seed: int = 0) -> M:
    """The module with every weight drawn anew, at a scale that keeps signals at about their size."""
    generator = torch.Generator().manual_seed(seed)
    norms = {id(m.weight) for m in module.modules() if isinstance(m, (nn.GroupNorm, nn.LayerNorm))}
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            parameter.copy_(0.2 * noise + (id(parameter) in norms))
        else:
            parameter.copy_(noise / math.sqrt(parameter[0].numel()))
    return module
