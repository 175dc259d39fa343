"""The training loop: draw a batch, compute its loss, step, average; save, resume, yield."""

from __future__ import annotations

import hashlib
import time
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from stable_diffusion.config import StageConfig
from stable_diffusion.errors import InputError

SAVE_SECONDS = 120.0
MOST_SKIPPED = 20  # steps in a row that are not finite before training gives up
AHEAD = 6  # batches that wait for a GPU
COOLDOWN = 0.4  # last part of the steps, over which the learning rate falls to 0

Compiler = Callable[[nn.Module], nn.Module]


@dataclass(frozen=True)
class TrainStep:
    """One step of a stage, or of the preparation before it."""

    stage: str
    index: int
    """Number of the optimizer update, or of the last row prepared, from 0."""
    total: int
    loss: float | None = None
    learning_rate: float = 0.0
    images_per_second: float = 0.0
    skipped: int = 0
    """Steps so far whose gradient was not finite; they change nothing."""

    def __str__(self) -> str:
        if self.loss is None:
            return ""
        skipped = f", {self.skipped} skipped" if self.skipped else ""
        return f"loss {self.loss:.4f}, {self.images_per_second:.0f} images/s{skipped}"


@dataclass(frozen=True)
class Draw:
    """The randomness of one step: a pure function of seed, stage and step, so that resuming is exact."""

    seed: int
    stage: str
    step: int
    places: range
    """Places in the batch that this process computes; of one process, all."""
    batch_size: int
    """Of all processes together."""

    def indices(self, count: int, weights: tuple[float, ...] | None = None) -> list[int]:
        """Which of `count` samples stand at the places: `count` a pass, in a new order every pass.

        Args:
            count: samples that there are.
            weights: of each, above 0: a pass draws its share, rounded up or down by lot. None draws each once.
        """
        turns = [divmod(self.step * self.batch_size + place, count) for place in self.places]
        weights = weights or (1.0,) * count
        orders = {turn: _order(self.seed, self.stage, turn, weights) for turn in {turn for turn, _ in turns}}
        return [orders[turn][i] for turn, i in turns]

    def generator(self) -> torch.Generator:
        """Of the whole batch's randomness; every process draws all of it and keeps its ``share``."""
        return torch.Generator().manual_seed(_seed(self.seed, self.stage, self.step))

    def share(self, drawn: Tensor) -> Tensor:
        """The rows of this process's places, of one row for each sample of the whole batch."""
        return drawn[self.places.start : self.places.stop : self.places.step]


@lru_cache(maxsize=4)
def _order(seed: int, stage: str, turn: int, weights: tuple[float, ...]) -> list[int]:
    """Systematic sampling (Madow 1949): equal steps through the summed weights from a random start, shuffled."""
    generator = torch.Generator().manual_seed(_seed(seed, stage, "order", turn))
    ends = torch.tensor(weights, dtype=torch.float64).cumsum(0)
    count = len(weights)
    start = torch.rand((), generator=generator, dtype=torch.float64)
    marks = (torch.arange(count, dtype=torch.float64) + start) * ends[-1] / count
    chosen = torch.searchsorted(ends, marks, right=True).clamp(max=count - 1)
    return chosen[torch.randperm(count, generator=generator)].tolist()


def _seed(*parts: object) -> int:
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest(), "big")


class Stage(Protocol):
    """What a stage of training is: an `nn.Module` whose forward pass gives the loss of a batch."""

    name: str
    settings: StageConfig

    def batch(self, draw: Draw) -> tuple[Tensor, ...]:
        """The tensors of a step, on the device: a pure function of `draw`."""
        ...

    def example(self) -> tuple[Tensor, ...]:
        """Tensors of the same shapes, to measure a step's time with before there is data."""
        ...

    def __call__(self, *batch: Tensor) -> Tensor: ...
    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...
    def train(self) -> object: ...
    def eval(self) -> object: ...


def learning_rate(settings: StageConfig, step: int, total: int) -> float:
    """Linear warm-up, constant, then a linear fall to 0 over the last part of the steps."""
    warmup = min(1.0, (step + 1) / max(1, min(settings.warmup_steps, total // 10)))
    cooldown = min(1.0, (total - step) / max(1.0, COOLDOWN * total))
    return settings.learning_rate * warmup * cooldown


class TrainState:
    """All that a step changes: weights, their average, the optimizer's moments, and the counts."""

    def __init__(self, stage: Stage, autocast: torch.dtype | None) -> None:
        self.trained = {name: p for name, p in stage.named_parameters() if p.requires_grad}
        self.parameters = list(self.trained.values())
        self.device = self.parameters[0].device
        self.average = [parameter.detach().clone() for parameter in self.parameters]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in self.parameters if p.ndim > 1]},
            {"params": [p for p in self.parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            groups,
            weight_decay=stage.settings.weight_decay,
            betas=(0.9, 0.99),
            fused=self.device.type in ("cpu", "cuda"),
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=autocast == torch.float16)
        self.step = 0  # the next one
        self.skipped = 0

    def save(self, path: Path) -> None:
        """Writes everything beside the checkpoint's name, then puts it in place."""
        tensors = {}
        for (name, parameter), mean in zip(self.trained.items(), self.average, strict=True):
            tensors[f"weights.{name}"] = parameter.detach()
            tensors[f"average.{name}"] = mean
            for field, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{field}.{name}"] = value
        counts = {"step": self.step, "skipped": self.skipped, "scale": self.scaler.get_scale()}
        path.parent.mkdir(parents=True, exist_ok=True)
        building = path.with_suffix(".part")
        save_file(
            {name: tensor.cpu().contiguous() for name, tensor in tensors.items()},
            building,
            metadata={key: str(value) for key, value in counts.items()},
        )
        building.replace(path)

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """Restores what ``save`` wrote."""
        with safe_open(path, "pt") as file:
            fields: dict[str, list[str]] = {}
            for key in file.keys():  # noqa: SIM118 (it is no dict)
                if key.startswith("optimizer."):
                    _, field, name = key.split(".", 2)
                    fields.setdefault(name, []).append(field)
            for (name, parameter), mean in zip(self.trained.items(), self.average, strict=True):
                parameter.copy_(file.get_tensor(f"weights.{name}"))
                mean.copy_(file.get_tensor(f"average.{name}"))
                for field in fields.get(name, []):
                    value = file.get_tensor(f"optimizer.{field}.{name}").to(self.device)
                    if value.shape == parameter.shape:
                        value = torch.empty_like(parameter).copy_(value)  # in the parameter's memory format
                    self.optimizer.state[parameter][field] = value
            counts = file.metadata()
        self.step, self.skipped = int(counts["step"]), int(counts["skipped"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict({**self.scaler.state_dict(), "scale": float(counts["scale"])})


def train_stage(
    stage: Stage,
    *,
    total: int,
    seed: int,
    path: Path,
    step_function: Callable[..., Tensor],
    autocast: torch.dtype | None,
    process: int = 0,
    processes: int = 1,
) -> Iterator[TrainStep]:
    """Trains the parameters of a stage that require gradients, up to step `total`, and leaves their average in it.

    Args:
        stage: what is trained.
        total: optimizer updates in all, those of earlier calls included.
        seed: of order, noise and choice of captions.
        path: the checkpoint, read when it exists and written every two minutes and at the end.
        step_function: the stage itself, or compiled or distributed.
        autocast: number format of the forward pass; None is float32.
        process: number of this process; the first one writes.
        processes: how many share each batch.

    Raises:
        InputError: the loss stays non-finite; the checkpoint keeps the last good state.
    """
    settings = stage.settings
    state = TrainState(stage, autocast)
    if path.is_file():
        state.load(path)
    first, in_a_row = state.step, 0
    began = saved_at = time.monotonic()
    places = range(process, settings.batch_size, processes)
    draws = (Draw(seed, stage.name, step, places, settings.batch_size) for step in range(first, total))
    batches = draw_batches(stage, draws, AHEAD if state.device.type == "cuda" else 0)

    stage.train()
    try:
        for step, batch in enumerate(batches, start=first):
            with torch.autocast(state.device.type, autocast or torch.bfloat16, enabled=autocast is not None):
                loss = step_function(*batch)
            state.scaler.scale(loss).backward()
            state.scaler.unscale_(state.optimizer)
            norm = torch.nn.utils.clip_grad_norm_(state.parameters, settings.max_grad_norm)
            rate = learning_rate(settings, step, total)
            for group in state.optimizer.param_groups:
                group["lr"] = rate
            finite = bool(torch.isfinite(norm))
            if finite:
                state.scaler.step(state.optimizer)
                decay = min(settings.ema_decay, (1 + step) / (10 + step))
                torch._foreach_lerp_(state.average, [p.detach() for p in state.parameters], 1 - decay)
            state.scaler.update()
            state.optimizer.zero_grad(set_to_none=True)

            state.step += 1
            state.skipped += not finite
            in_a_row = 0 if finite else in_a_row + 1
            if in_a_row >= MOST_SKIPPED:
                raise InputError(
                    f"{stage.name}: the gradient was not finite {MOST_SKIPPED} times in a row at step {step + 1};"
                    f" lower the learning rate (now {settings.learning_rate}) and run again from the last good state"
                )
            if process == 0 and (state.step == total or time.monotonic() - saved_at > SAVE_SECONDS):
                state.save(path)
                saved_at = time.monotonic()
            speed = (state.step - first) * settings.batch_size / max(time.monotonic() - began, 1e-9)
            yield TrainStep(stage.name, step, total, float(loss.detach()), rate, speed, state.skipped)
    except GeneratorExit:  # stopped between two steps: this is a good state
        if process == 0:
            state.save(path)
        raise
    finally:
        batches.close()
        stage.eval()
    with torch.no_grad():
        for parameter, mean in zip(state.parameters, state.average, strict=True):
            parameter.copy_(mean)


def draw_batches(
    stage: Stage, draws: Iterable[Draw], ahead: int
) -> Generator[tuple[Tensor, ...], None, None]:
    """The batch of each draw, in their order; `ahead` of them are made on other threads beforehand.

    A GPU would wait for them. On a CPU, where they take cores from training, `ahead` is 0.
    """
    if ahead == 0:
        yield from map(stage.batch, draws)
        return
    with ThreadPoolExecutor(ahead) as threads:
        waiting: deque[Future[tuple[Tensor, ...]]] = deque()
        try:
            for draw in draws:
                waiting.append(threads.submit(stage.batch, draw))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            threads.shutdown(wait=False, cancel_futures=True)


class CompiledOrEager:
    """Compiles stages; all of them run plain, after one warning, where compiling is not possible."""

    def __init__(self, compiler: Compiler) -> None:
        self.compiler = compiler
        self.possible = True

    def __call__(self, stage: nn.Module) -> Callable[..., Tensor]:
        compiled = self.compiler(stage)

        def step(*batch: Tensor) -> Tensor:
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
