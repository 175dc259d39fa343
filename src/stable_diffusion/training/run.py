"""A whole training run: a plan, then each stage of a list, prepared, trained and finished."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
from accelerate import PartialState

from stable_diffusion.data.item import Entry, Source
from stable_diffusion.errors import InputError, shown, unknown_name
from stable_diffusion.fields import ABOVE_0, typed
from stable_diffusion.training.compute import Compiler, Computer
from stable_diffusion.training.draw import SEED
from stable_diffusion.training.events import Event, Plan
from stable_diffusion.training.lock import alone
from stable_diffusion.training.loop import train_stage
from stable_diffusion.training.pace import Clock
from stable_diffusion.training.record import RunRecord, facts
from stable_diffusion.training.stage import Stage, StageSettings
from stable_diffusion.training.stages import DEFAULT, STAGES
from stable_diffusion.training.workspace import TrainableParts, Workspace


def train_model(
    parts: TrainableParts,
    data: Source,
    stages: Sequence[StageSettings] | None = None,
    *,
    output_dir: Path,
    seed: int = 0,
    steps: int | None = None,
    minutes: float | None = None,
    resume: bool = True,
    autocast: bool = False,
    compiler: Compiler | None = None,
    about: Mapping[str, object] | None = None,
    clock: Clock = time.monotonic,
) -> Generator[Event, None, None]:
    """Trains a model's parts in place: first the plan, then every step of every stage.

    `clock` gives seconds; the other arguments and the errors are those of ``DiffusionModel.train``.
    """
    stages, entries = DEFAULT if stages is None else stages, data.entries()
    processes = PartialState(cpu=parts.unet.device.type == "cpu")
    check_lengths(steps, minutes)
    typed(SEED, seed, "seed")
    _check(parts, entries, stages, processes.num_processes)
    for module in (parts.vae, parts.unet):
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # missing in torch's stubs

    stages = [_fitting(settings, len(entries), processes.num_processes) for settings in stages]
    built = [STAGES[settings.kind].stage(parts, settings) for settings in stages]
    computer = Computer(built, autocast, compiler, clock)
    run = facts(parts.config, entries, {**(about or {}), "seed": seed}, computer)
    with alone(output_dir):
        record = RunRecord(output_dir, run, resume, computer)
        plan = record.plan(steps, minutes)
        workspace = Workspace(parts, data, entries, output_dir / "cache", computer.dtype)
        yield Plan(
            name=parts.config.name,
            pictures=len(entries),
            captions=len(workspace.captions) - 1,
            steps={name: planned["steps"] for name, planned in plan.items()},
            seconds={name: planned["seconds"] for name, planned in plan.items()},
            device=str(computer.device),
            number_format=computer.number_format,
            compiled=None
            if compiler is None
            else [stage.settings.name for stage in built if stage in computer.compiled],
        )
        for stage in built:
            yield from _train(stage, workspace, computer, record, seed)


def _train(
    stage: Stage, workspace: Workspace, computer: Computer, record: RunRecord, seed: int
) -> Generator[Event, None, None]:
    """Prepares, trains and finishes a stage, also where training is stopped on the way."""
    done = False
    try:
        with record.paused():  # a budget is for steps
            yield from stage.prepare(workspace)
        pace, path = record.pace(stage), record.checkpoint(stage)
        training = train_stage(stage, computer, pace=pace, seed=seed, path=path)
        with contextlib.closing(training):  # saves before the stage is finished
            for event in training:
                record.note(event)
                yield event
        done = True
    finally:
        stage.finish(done)
        record.finish(stage, done)


def _fitting(settings: StageSettings, pictures: int, processes: int) -> StageSettings:
    """With a batch that is no larger than the set, unless processes and micro-batches need more."""
    least = processes * settings.gradient_accumulation_steps
    return replace(settings, batch_size=min(settings.batch_size, max(pictures, least)))


def check_lengths(steps: int | None, minutes: float | None) -> None:
    """Raises InputError for a length that no run can have."""
    if steps is not None and minutes is not None:
        raise InputError(f"give steps or minutes, not both: got steps {steps} and minutes {minutes}")
    typed(Annotated[int, ABOVE_0] | None, steps, "steps")
    typed(Annotated[float, ABOVE_0] | None, minutes, "minutes")


def _check(
    parts: TrainableParts, entries: Sequence[Entry], stages: Sequence[StageSettings], processes: int
) -> None:
    """Raises InputError for what cannot be trained: a model, data, or a list of stages."""
    if not entries:
        raise InputError("there are no captioned pictures to train on: the set is empty")
    if parts.unet.dtype != torch.float32:
        raise InputError("training keeps its weights in float32: load the model with dtype=torch.float32")
    if parts.config.unet.num_class_embeds is not None:
        raise InputError(
            "training learns from captions: a U-Net with num_class_embeds cannot be trained here"
        )
    if not isinstance(stages, Sequence) or not all(isinstance(stage, StageSettings) for stage in stages):
        raise InputError(
            f"stages must be a list of settings, such as [DenoiserSettings()], got {shown(stages)}"
        )
    names = [settings.name for settings in stages]
    if not names:
        raise InputError(
            "there is no stage to train: give a recipe with one, beside the autoencoder's for --start"
        )
    for settings in stages:
        if settings.kind not in STAGES:
            raise unknown_name("stage kind", settings.kind, STAGES)
        if not isinstance(settings, wanted := STAGES[settings.kind].settings):
            raise InputError(
                f"a stage of the kind {settings.kind!r} is set by {wanted.__name__}, got {shown(settings)}"
            )
        if names.count(settings.name) > 1:
            raise InputError(f"two stages have the name {settings.name!r}: give each a name of its own")
        if settings.batch_size < processes * settings.gradient_accumulation_steps:
            raise InputError(
                f"the stage {settings.name!r} has a batch of {settings.batch_size} for {processes} processes and"
                f" {settings.gradient_accumulation_steps} micro-batches: make it larger"
            )
