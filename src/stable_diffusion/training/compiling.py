"""Stages through ``torch.compile``, or plain where that is not possible."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Compiler = Callable[[nn.Module], Any]


class CompiledOrEager:
    """Compiles stages; all of them run plain, after one warning, where compiling is not possible."""

    def __init__(self, compiler: Compiler) -> None:
        self.compiler = compiler
        self.possible = True

    def __call__(self, stage: nn.Module) -> Callable[..., dict[str, Tensor]]:
        compiled = self.compiler(stage)

        def step(*batch: Tensor) -> dict[str, Tensor]:
            if self.possible:
                try:
                    return compiled(*batch)
                except torch._dynamo.exc.BackendCompilerFailed as error:
                    self.possible = False
                    inner = error.inner_exception
                    reason = (str(inner).strip() or type(inner).__name__).splitlines()[0]
                    warnings.warn(
                        f"training runs uncompiled, since torch.compile failed here: {reason}", stacklevel=2
                    )
            return stage(*batch)

        return step
