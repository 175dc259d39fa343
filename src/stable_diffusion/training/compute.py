"""What computes a stage's losses: the stage itself, compiled or shared by processes, in the device's number format."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn

from stable_diffusion.runtime import has_native_bf16
from stable_diffusion.training.loop import StepFunction
from stable_diffusion.training.pace import Clock
from stable_diffusion.training.stage import Stage

OVERHEAD = 1.1  # reading batches, the optimizer's step, saving: beside what is measured

Compiler = Callable[[nn.Module], Any]


class CompiledOrEager:
    """Compiles stages; all of them run plain, after one warning, where compiling is not possible."""

    def __init__(self, compiler: Compiler) -> None:
        self.compiler = compiler
        self.possible = True

    def __call__(self, stage: nn.Module) -> StepFunction:
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


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The 16-bit format that the device is good at; None, with a warning, where it is good at none."""
    if has_native_bf16(device):
        return torch.bfloat16
    if device.type == "cuda":
        return torch.float16
    warnings.warn(f"this {device.type} is not faster in 16 bits: training in float32", stacklevel=4)
    return None


def step_function(stage: Stage, compiling: CompiledOrEager | None, state: PartialState) -> StepFunction:
    """What computes a stage's losses: the stage, its copies on several devices kept equal, or it compiled."""
    assert isinstance(stage, nn.Module)
    module: nn.Module = stage
    if state.num_processes > 1:
        devices = None if state.device.type == "cpu" else [state.device]
        module = nn.parallel.DistributedDataParallel(stage.to(state.device), device_ids=devices)
    return module if compiling is None else compiling(module)


def measure(
    stage: Stage, step: StepFunction, dtype: torch.dtype | None, state: PartialState, clock: Clock
) -> float:
    """Seconds of one update: the second and third of three on random tensors. It changes no weight."""
    parts = stage.settings.gradient_accumulation_steps
    batch = stage.example(math.ceil(stage.settings.batch_size / (parts * state.num_processes)))
    times = []
    for _ in range(3):
        began = clock()
        with torch.autocast(batch[0].device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            losses = step(*batch)
        loss = torch.stack([*losses.values()]).sum()
        loss.backward()
        float(loss.detach())  # waits for the device
        times.append(clock() - began)
        stage.zero_grad(set_to_none=True)
    return OVERHEAD * parts * sum(times[1:]) / 2
