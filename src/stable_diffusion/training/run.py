"""A whole training run: a plan, then each stage of a list, prepared, trained and finished."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path

import torch
from accelerate import PartialState

from stable_diffusion.data.item import Source
from stable_diffusion.errors import InputError, unknown_name
from stable_diffusion.training import compute
from stable_diffusion.training.compute import Compiler, Computer
from stable_diffusion.training.events import Event, Plan
from stable_diffusion.training.loop import train_stage
from stable_diffusion.training.pace import Clock
from stable_diffusion.training.record import RunRecord, identified, machine
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
    stages, device = DEFAULT if stages is None else stages, parts.unet.device
    entries, processes = data.entries(), PartialState(cpu=device.type == "cpu")
    _check_lengths(steps, minutes)
    if not entries:
        raise InputError("there are no captioned pictures to train on: the set is empty")
    _check_stages(stages, processes.num_processes)
    if parts.unet.dtype != torch.float32:
        raise InputError("training keeps its weights in float32: load the model with dtype=torch.float32")

    for module in (parts.vae, parts.unet):
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # missing in torch's stubs
    computer = Computer(device, processes, autocast, compiler)
    built = [STAGES[settings.kind].stage(parts, settings) for settings in stages]
    functions = {stage: computer.function(stage) for stage in built}

    def measured(stage: Stage) -> float:
        return compute.measure(stage, functions[stage], processes.num_processes, clock)

    number_format = str(computer.dtype or torch.float32).removeprefix("torch.")
    facts = identified(parts.config, stages, entries, seed, about or {})
    facts |= {"machine": machine(device, number_format), "minutes": minutes}
    record = RunRecord(output_dir, facts, resume, clock, processes.is_main_process)
    processes.wait_for_everyone()  # all have read the record before one writes it
    if processes.is_main_process and not resume:
        for file in ("run.json", "log.jsonl", *(f"{settings.name}.safetensors" for settings in stages)):
            (output_dir / file).unlink(missing_ok=True)
    plan = record.plan(built, len(entries), steps, minutes, measured)
    workspace = Workspace(parts, data, entries, output_dir / "cache")
    yield Plan(
        name=parts.config.name,
        pictures=len(entries),
        captions=len(workspace.captions) - 1,
        steps={name: planned["steps"] for name, planned in plan.items()},
        seconds={name: planned["seconds"] for name, planned in plan.items()},
        device=str(device),
        number_format=number_format,
    )
    for i, stage in enumerate(built):
        done = False
        try:
            yield from stage.prepare(workspace)
            training = train_stage(
                stage,
                functions[stage],
                pace=record.pace(built[i:], measured),
                seed=seed,
                path=output_dir / f"{stage.settings.name}.safetensors",
                autocast=computer.dtype,
                process=processes.process_index,
                processes=processes.num_processes,
            )
            with contextlib.closing(training):  # saves before the stage is finished
                for event in training:
                    record.note(event)
                    yield event
            done = True
        finally:
            stage.finish(done)
            record.finish(stage.settings, done)


def _check_lengths(steps: int | None, minutes: float | None) -> None:
    """Raises InputError for a length that no run can have."""
    if steps is not None and minutes is not None:
        raise InputError(f"give steps or minutes, not both: got steps {steps} and minutes {minutes}")
    for name, value in (("steps", steps), ("minutes", minutes)):
        if value is not None and not value > 0:
            raise InputError(f"{name} must be above 0, got {value}")


def _check_stages(stages: Sequence[StageSettings], processes: int) -> None:
    """Raises InputError for a list of stages that cannot be trained."""
    names = [settings.name for settings in stages]
    if not names:
        raise InputError(
            "there is no stage to train: give a recipe with one, beside the autoencoder's for --start"
        )
    for settings in stages:
        if settings.kind not in STAGES:
            raise unknown_name("stage kind", settings.kind, STAGES)
        if names.count(settings.name) > 1:
            raise InputError(f"two stages have the name {settings.name!r}: give each a name of its own")
        if settings.batch_size < processes * settings.gradient_accumulation_steps:
            raise InputError(
                f"the stage {settings.name!r} has a batch of {settings.batch_size} for {processes} processes and"
                f" {settings.gradient_accumulation_steps} micro-batches: make it larger"
            )
