"""A whole training run: a plan, then each stage of a list, prepared, trained and finished."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from stable_diffusion.config import to_dict
from stable_diffusion.data.cache import digest
from stable_diffusion.data.item import Source
from stable_diffusion.errors import InputError, unknown_name
from stable_diffusion.training import compute, loop
from stable_diffusion.training.compute import CompiledOrEager, Compiler, autocast_dtype, step_function
from stable_diffusion.training.events import Event, Plan, Replan
from stable_diffusion.training.loop import train_stage
from stable_diffusion.training.observers import JsonLines
from stable_diffusion.training.pace import Clock, Pace
from stable_diffusion.training.record import RunRecord, fingerprint, machine
from stable_diffusion.training.stage import Stage, StageSettings
from stable_diffusion.training.stages import DEFAULT, STAGES
from stable_diffusion.training.state import saved_step
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
    if steps is not None and minutes is not None:
        raise InputError(f"give steps or minutes, not both: got steps {steps} and minutes {minutes}")
    for name, value in (("steps", steps), ("minutes", minutes)):
        if value is not None and not value > 0:
            raise InputError(f"{name} must be above 0, got {value}")
    stages = DEFAULT if stages is None else stages
    entries, config, device = data.entries(), parts.config, parts.unet.device
    if not entries:
        raise InputError("there are no captioned pictures to train on: the set is empty")
    state = PartialState(cpu=device.type == "cpu")
    _check(stages, state.num_processes)
    if parts.unet.dtype != torch.float32:
        raise InputError("training keeps its weights in float32: load the model with dtype=torch.float32")
    dtype = autocast_dtype(device) if autocast else None
    number_format = str(dtype or torch.float32).removeprefix("torch.")

    for module in (parts.vae, parts.unet):
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # missing in torch's stubs
    built: list[Stage] = [STAGES[settings.kind].stage(parts, settings) for settings in stages]
    compiling = None if compiler is None else CompiledOrEager(compiler)
    functions = {stage.settings.name: step_function(stage, compiling, state) for stage in built}

    model, recipe = to_dict(config), [to_dict(settings) for settings in stages]
    facts = {
        "recipe": {**(about or {}), "seed": seed, "stage": recipe, "model": model},
        "data": fingerprint(entries),
        "machine": machine(device, number_format),
        "minutes": minutes,
    }
    trained = ("sample_size", "vae", "unet", "text_encoders", "schedule")  # not prompts nor samplers
    identity = digest(facts["data"], seed, recipe, [model[name] for name in trained])
    record = RunRecord(output_dir, identity, facts, resume, clock)
    plan = record.content["plan"]
    state.wait_for_everyone()  # all have read the record before one writes it
    if state.is_main_process and not resume:
        for file in ("run.json", "log.jsonl", *(f"{name}.safetensors" for name in functions)):
            (output_dir / file).unlink(missing_ok=True)

    def measured(stage: Stage) -> float:
        function = functions[stage.settings.name]
        return float(broadcast_object_list([compute.measure(stage, function, dtype, state, clock)])[0])

    if not plan or minutes not in (None, record.content["minutes"]):
        for stage in built:
            seconds = measured(stage)
            length = _length(stage.settings, len(entries))
            if minutes is not None:
                length = max(1, int(60 * minutes * _part(built, stage) / seconds))
            plan[stage.settings.name] = {"steps": length, "seconds": seconds}
        record.content["minutes"] = minutes
    if steps is not None:
        record.content["minutes"] = None
        for planned in plan.values():
            planned["steps"] = steps
    minutes = record.content["minutes"]
    if state.is_main_process:
        record.write()
    workspace = Workspace(parts, data, entries, output_dir / "cache")
    yield Plan(
        name=config.name,
        pictures=len(entries),
        captions=len(workspace.captions) - 1,
        steps={name: planned["steps"] for name, planned in plan.items()},
        seconds={name: planned["seconds"] for name, planned in plan.items()},
        device=str(device),
        number_format=number_format,
    )

    log = JsonLines(output_dir / "log.jsonl", record.spent)
    for i, stage in enumerate(built):
        settings, path = stage.settings, output_dir / f"{stage.settings.name}.safetensors"
        planned, done = plan[settings.name], False

        def left(planned: dict[str, float] = planned) -> float:
            return planned["until"] - record.spent()

        pace = Pace(settings, planned["steps"], None if minutes is None else left, clock)
        try:
            yield from stage.prepare(workspace)
            changes: list[Replan | None] = []
            if minutes is not None and "until" not in planned:
                rest = 60 * minutes - record.spent()
                planned["until"] = record.spent() + rest * _part(built[i:], stage)
                changes.append(pace.plan(saved_step(path), measured(stage)))
            training = train_stage(
                stage,
                pace=pace,
                seed=seed,
                path=path,
                step_function=functions[settings.name],
                autocast=dtype,
                process=state.process_index,
                processes=state.num_processes,
            )
            with contextlib.closing(training):  # saves before the stage is finished
                for event in itertools.chain(filter(None, changes), training):
                    if isinstance(event, Replan):
                        planned |= {"steps": event.steps, "seconds": event.seconds}
                    if state.is_main_process:
                        log(event)
                        late = record.spent() - record.content["spent"] > loop.SAVE_SECONDS
                        if isinstance(event, Replan) or late:
                            record.write()
                    yield event
            done = True
        finally:
            stage.finish(done)
            if state.is_main_process:
                if done and log.stage == settings.name:
                    figures = log.figures(settings.name, settings.batch_size)
                    record.content["figures"][settings.name] = figures
                record.write()


def _check(stages: Sequence[StageSettings], processes: int) -> None:
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


def _length(settings: StageSettings, count: int) -> int:
    return max(settings.min_steps, round(settings.epochs * count / settings.batch_size))


def _part(stages: Sequence[Stage], stage: Stage) -> float:
    """A stage's part of the time that these stages have."""
    return stage.share / sum(other.share for other in stages)
