"""What a training step of the packaged model's denoiser costs: pictures a second, and the part of it in products.

    python -m benchmarks.training_step [--batch 32 64 128] [--steps 7] [--compile] [--give-back] [--quick]

A step is forward and backward pass, update and average, in bfloat16 where the processor is good at it, on random
latents and full-length captions, with freed memory kept as `minisd train` keeps it, unless `--give-back`. Medians, with
the smallest and the largest, after two steps that are not counted. Beside them: what a large matrix product reaches in
the same run, which no step can pass. `--quick` takes one small step: it shows that it runs, not what it costs.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch.utils.flop_counter import FlopCounterMode

from stable_diffusion import DiffusionModel
from stable_diffusion.checkpoints.checkpoint import packaged
from stable_diffusion.runtime import keep_freed_memory
from stable_diffusion.training.compute import Computer
from stable_diffusion.training.stages.denoiser import DenoiserSettings, DenoiserStage
from stable_diffusion.training.state import TrainState

SIDE = 2048  # of the large matrices


def seconds(function: Callable[[], object], runs: int, warm_up: int = 2) -> list[float]:
    """Of each run."""
    times = []
    for _ in range(warm_up + runs):
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return times[warm_up:]


def step_function(
    stage: DenoiserStage, batch: int, compiler: Callable[..., object] | None
) -> Callable[[], float]:
    """Trains for a step, and returns the loss."""
    computer = Computer([stage], autocast=True, compiler=compiler)
    if compiler is not None:
        computer.compiled.add(stage)
    state, tensors = TrainState(stage.players(), computer.dtype), stage.example(batch)
    stage.train()

    def step() -> float:
        loss = torch.stack([*computer.functions[stage](*tensors).values()]).sum()
        loss.backward()
        state.update(dict.fromkeys(state.players, 1e-6))
        return float(loss.detach())

    return step


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--compile", action="store_true", help="compile the stage, in the warm-up")
    parser.add_argument("--give-back", action="store_true", help="give freed memory back to the kernel")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(arguments)
    batches, steps, side = ([2], 1, 64) if options.quick else (options.batch, options.steps, SIDE)
    if not (options.quick or options.give_back):
        keep_freed_memory()

    model = DiffusionModel.from_pretrained(packaged("model"))
    model.unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # missing in torch's stubs
    stage = DenoiserStage(model, DenoiserSettings())
    matrix = torch.randn(side, side, dtype=torch.bfloat16)
    limit = 2 * side**3 / min(seconds(lambda: matrix @ matrix, 9))
    print(
        f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads,"
        f" {steps} steps; a large bfloat16 matrix product: {limit / 1e9:.0f} GFLOP/s"
    )
    for batch in batches:
        step = step_function(stage, batch, torch.compile if options.compile else None)
        times = seconds(step, steps, warm_up=0 if options.quick else 2)
        with FlopCounterMode(display=False) as counter:
            step_function(stage, batch, None)()
        flops, median = counter.get_total_flops(), statistics.median(times)
        print(
            f"batch {batch:4} {batch / median:7.1f} pictures/s  ({batch / max(times):.1f} to {batch / min(times):.1f}),"
            f" {flops / median / 1e9:.0f} GFLOP/s, {flops / median / limit:.0%} of the product's"
        )


if __name__ == "__main__":
    main()
