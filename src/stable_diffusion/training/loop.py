"""The training loop: sample a batch, compute its losses, step, average; save, resume, yield."""

from __future__ import annotations

import functools
import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from stable_diffusion.errors import InputError
from stable_diffusion.training.draw import Draw
from stable_diffusion.training.events import Replan, TrainStep
from stable_diffusion.training.pace import Pace
from stable_diffusion.training.parallel import summed
from stable_diffusion.training.stage import Batch, Stage
from stable_diffusion.training.state import TrainState

SAVE_SECONDS = 120.0
MOST_SKIPPED = 20  # steps in a row that are not finite before training gives up
AHEAD = 6  # batches that wait for a GPU

StepFunction = Callable[..., dict[str, Tensor]]


def train_stage(
    stage: Stage,
    *,
    pace: Pace,
    seed: int,
    path: Path,
    step_function: StepFunction,
    autocast: torch.dtype | None,
    process: int = 0,
    processes: int = 1,
) -> Generator[TrainStep | Replan, None, None]:
    """Trains the players of a stage to the last step of `pace`, and leaves their averages in it.

    Args:
        stage: what is trained.
        pace: optimizer updates in all, those of earlier calls included.
        seed: of order, noise and choice of captions.
        path: the checkpoint, read when it exists and written every two minutes and at the end.
        step_function: the stage itself, or compiled or distributed.
        autocast: number format of the forward pass; None is float32.
        process: number of this process; the first one writes.
        processes: how many share each batch.

    Raises:
        InputError: the loss stays non-finite; the checkpoint keeps the last good state.
    """
    settings, count = stage.settings, stage.settings.batch_size
    state = TrainState(stage.players(), autocast)
    if path.is_file():
        state.load(path)
    first, in_a_row = state.step, 0
    began = saved_at = pace.clock()
    parts = [
        range(process + i * processes, count, processes * settings.gradient_accumulation_steps)
        for i in range(settings.gradient_accumulation_steps)
    ]
    draws = (
        Draw(seed, settings.name, step, part, count) for step in itertools.count(first) for part in parts
    )
    batches = make_batches(stage, draws, AHEAD if state.device.type == "cuda" else 0)

    stage.train()
    try:
        while state.step < pace.total:
            losses: dict[str, Tensor] = {}
            for part, batch in zip(parts, batches, strict=False):
                with torch.autocast(
                    state.device.type, autocast or torch.bfloat16, enabled=autocast is not None
                ):
                    terms = step_function(*batch)
                # A mean over the batch is one of means over its parts; processes' gradients will be averaged.
                loss = functools.reduce(torch.add, terms.values()) * (processes * len(part) / count)
                state.scaler.scale(loss).backward()
                for name, term in terms.items():
                    losses[name] = losses.get(name, 0.0) + term.detach().float() * (len(part) / count)
            step = state.step
            rates = {name: player.settings.rate(step, pace.total) for name, player in state.players.items()}
            finite = state.update(rates)
            in_a_row = 0 if finite else in_a_row + 1
            if in_a_row >= MOST_SKIPPED:
                raise InputError(
                    f"{settings.name}: the gradient was not finite {MOST_SKIPPED} times in a row at step {step + 1};"
                    f" lower the learning rate (now {settings.learning_rate}) and run again from the last good state"
                )
            total, change = pace.total, pace.tick(state.step)
            late = pace.clock() - saved_at > SAVE_SECONDS
            if process == 0 and (state.step == pace.total or change is not None or late):
                state.save(path)
                saved_at = pace.clock()
            values = dict(zip(losses, summed(torch.stack([*losses.values()])).tolist(), strict=True))
            speed = (state.step - first) * count / max(pace.clock() - began, 1e-9)
            yield TrainStep(settings.name, step, total, values, rates, speed, state.skipped)
            if change is not None:
                yield change
    except GeneratorExit:  # stopped between two steps: this is a good state
        if process == 0:
            state.save(path)
        raise
    finally:
        batches.close()
        stage.eval()
    state.take_average()


def make_batches(stage: Stage, draws: Iterable[Draw], ahead: int) -> Generator[Batch, None, None]:
    """The batch of each draw, in their order; `ahead` of them are made on other threads beforehand.

    A GPU would wait for them. On a CPU, where they take cores from training, `ahead` is 0.
    """
    if ahead == 0:
        yield from map(stage.batch, draws)
        return
    with ThreadPoolExecutor(ahead) as threads:
        waiting: deque[Future[Batch]] = deque()
        try:
            for draw in draws:
                waiting.append(threads.submit(stage.batch, draw))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            threads.shutdown(wait=False, cancel_futures=True)
