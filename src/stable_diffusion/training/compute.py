"""What computes a stage's losses: the stage, in the device's number format, compiled, shared by processes."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from stable_diffusion.runtime import has_native_bf16
from stable_diffusion.training.pace import Clock
from stable_diffusion.training.stage import Stage

OVERHEAD = 1.1  # reading batches, the optimizer's step, saving: beside what is measured

Compiler = Callable[[nn.Module], Any]
StepFunction = Callable[..., dict[str, Tensor]]


class Computer:
    """Computes the losses of a run's stages, and says how long that takes.

    Args:
        stages: on the model's device.
        autocast: whether to compute in 16 bits where the device is good at it.
        compiler: of the stages in `compiled`; they run plain, after one warning, where compiling is not possible.
        clock: gives seconds.

    Attributes:
        process: number of this process, from 0.
        processes: how many share each batch.
        dtype: the 16-bit format; None for float32.
        functions: what computes each stage's losses.
        compiled: the stages that are compiled before their next step; none at first.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        autocast: bool = False,
        compiler: Compiler | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        self.device, self.compiler, self.clock = stages[0].device, compiler, clock
        self.state = PartialState()
        self.process, self.processes = self.state.process_index, self.state.num_processes
        self.dtype = autocast_dtype(self.device) if autocast else None
        self.functions = {stage: self._function(stage) for stage in stages}
        self.compiled: set[Stage] = set()

    def _function(self, stage: Stage) -> StepFunction:
        module: nn.Module = stage
        if self.processes > 1:
            home = self.state.device
            devices = None if home.type == "cpu" else [home]
            module = nn.parallel.DistributedDataParallel(stage.to(home), device_ids=devices)
        compiled = module if self.compiler is None else self.compiler(module)
        dtype = self.dtype or torch.bfloat16

        def step(*batch: Tensor) -> dict[str, Tensor]:
            with torch.autocast(self.device.type, dtype, enabled=self.dtype is not None):
                if stage in self.compiled:
                    try:
                        return compiled(*batch)
                    except torch._dynamo.exc.BackendCompilerFailed as error:
                        self.compiled.clear()
                        inner = error.inner_exception
                        reason = (str(inner).strip() or type(inner).__name__).splitlines()[0]
                        said = f"training runs uncompiled, since torch.compile failed here: {reason}"
                        warnings.warn(said, stacklevel=2)
                return module(*batch)

        return step

    @property
    def number_format(self) -> str:
        """Of the losses, such as ``bfloat16``."""
        return str(self.dtype or torch.float32).removeprefix("torch.")

    def measure(self, stage: Stage) -> float:
        """Seconds of one update: the second and third of three on random tensors. It changes no weight."""
        parts = stage.settings.gradient_accumulation_steps
        batch = stage.example(math.ceil(stage.settings.batch_size / (parts * self.processes)))
        times = []
        for _ in range(3):
            began = self.clock()
            loss = torch.stack([*self.functions[stage](*batch).values()]).sum()
            loss.backward()
            float(loss.detach())  # waits for the device
            times.append(self.clock() - began)
            stage.zero_grad(set_to_none=True)
        seconds = OVERHEAD * parts * sum(times[1:]) / 2
        return float(broadcast_object_list([seconds])[0])  # the first process's clock counts


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The 16-bit format that the device is good at; None, with a warning, where it is good at none."""
    if has_native_bf16(device):
        return torch.bfloat16
    if device.type == "cuda":
        return torch.float16
    warnings.warn(f"this {device.type} is not faster in 16 bits: training in float32", stacklevel=5)
    return None


def is_shared() -> bool:
    """Whether several processes share each batch."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def summed(x: Tensor) -> Tensor:
    """The sum of all processes' tensors; its gradient is that of one process that holds all of them."""
    if not is_shared():
        return x
    from torch.distributed.nn.functional import all_reduce

    return all_reduce(x)


def gathered(x: Tensor) -> Tensor:
    """The rows of all processes, the first one's first; the gradient is that of one process that holds all of them."""
    if not is_shared():
        return x
    rank, counts = dist.get_rank(), torch.zeros(dist.get_world_size(), dtype=torch.int64, device=x.device)
    counts[rank] = len(x)
    dist.all_reduce(counts)
    first, total = int(counts[:rank].sum()), int(counts.sum())
    if total == 0:
        return x
    rows = x.new_zeros(total, *x.shape[1:])
    rows[first : first + len(x)] = x
    return summed(rows)


def agreed(number: int) -> int:
    """The largest of all processes' numbers."""
    if not is_shared():
        return number
    largest = torch.tensor(number, device=PartialState().device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)
