"""The training loop: sample a batch, compute its losses, step, average; save, resume, yield."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Generator, Iterable
from pathlib import Path

import torch
from torch import Tensor

from stable_diffusion.data.item import ahead
from stable_diffusion.errors import InputError
from stable_diffusion.files import is_file
from stable_diffusion.training.compute import Computer, summed
from stable_diffusion.training.draw import Draw
from stable_diffusion.training.events import Replan, TrainStep
from stable_diffusion.training.pace import Pace
from stable_diffusion.training.stage import Batch, Stage
from stable_diffusion.training.state import TrainState

SAVE_SECONDS = 120.0
MOST_SKIPPED = 20  # steps in a row that are not finite before training gives up
THREADS = 6  # that make batches for a GPU


def train_stage(
    stage: Stage, computer: Computer, *, pace: Pace, seed: int, path: Path
) -> Generator[TrainStep | Replan, None, None]:
    """Trains the players of a stage to the last step of `pace`, and leaves their averages in it.

    Args:
        stage: what is trained.
        computer: computes its losses; of the processes that share each batch, the first one writes.
        pace: optimizer updates in all, those of earlier calls included.
        seed: of order, noise and choice of captions.
        path: the checkpoint, read when it exists and written every two minutes and at the end.

    Raises:
        InputError: the loss stays non-finite; the checkpoint keeps the last good state.
    """
    settings, count = stage.settings, stage.settings.batch_size
    process, processes = computer.process, computer.processes
    state = TrainState(stage.players(), computer.dtype)
    if is_file(path):
        state.load(path)
    if (change := pace.begin(state.step)) is not None:
        yield change
    first, in_a_row = state.step, 0
    began = saved_at = pace.clock()
    together = processes * settings.gradient_accumulation_steps
    parts = [range(start, count, together) for start in range(process, together, processes)]
    draws = (
        Draw(seed, settings.name, step, part, count) for step in itertools.count(first) for part in parts
    )
    batches = make_batches(stage, draws, THREADS if state.device.type == "cuda" else 0)

    stage.train()
    try:
        while state.step < pace.total:
            losses: dict[str, Tensor] = {}
            for part, batch in zip(parts, batches, strict=False):
                terms = computer.functions[stage](*batch)
                # A mean over the batch is one of means over its parts; processes' gradients will be averaged.
                loss = functools.reduce(torch.add, terms.values()) * (processes * len(part) / count)
                state.scaler.scale(loss).backward()
                for name, term in terms.items():
                    losses[name] = losses.get(name, 0.0) + term.detach().float() * (len(part) / count)
            step = state.step
            rates = {name: player.settings.rate(step, pace.total) for name, player in state.players.items()}
            in_a_row = 0 if state.update(rates) else in_a_row + 1
            if in_a_row >= MOST_SKIPPED:
                raise InputError(
                    f"{settings.name}: the gradient was not finite {MOST_SKIPPED} times in a row at step {step + 1};"
                    f" lower the learning rate (now {settings.learning_rate}) and run again from the last good state"
                )
            total, change = pace.total, pace.tick(state.step)
            values = dict(zip(losses, summed(torch.stack([*losses.values()])).tolist(), strict=True))
            speed = (state.step - first) * count / max(pace.clock() - began, 1e-9)
            yield TrainStep(settings.name, step, total, values, rates, speed, state.skipped)
            # After the step is told: a log that is ahead of the checkpoint is put right, one behind lacks a line.
            late = pace.clock() - saved_at > SAVE_SECONDS
            if process == 0 and (state.step == pace.total or change is not None or late):
                state.save(path)
                saved_at = pace.clock()
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


def make_batches(stage: Stage, draws: Iterable[Draw], threads: int) -> Generator[Batch, None, None]:
    """The batch of each draw, in their order, made on so many threads beforehand.

    A GPU would wait for them. On a CPU, where they take cores from training, `threads` is 0.
    """
    yield from ahead(stage.batch, draws, threads) if threads else map(stage.batch, draws)
