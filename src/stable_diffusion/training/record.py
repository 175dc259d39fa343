"""What a run's folder remembers: ``run.json``, with the plan by which the run goes on, and ``log.jsonl``."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from stable_diffusion.config import ModelConfig, to_dict
from stable_diffusion.data.cache import digest
from stable_diffusion.data.item import Entry
from stable_diffusion.errors import InputError
from stable_diffusion.files import read_json, write_json
from stable_diffusion.runtime import has_native_bf16, version
from stable_diffusion.training.compute import Computer
from stable_diffusion.training.events import Event, Replan
from stable_diffusion.training.loop import SAVE_SECONDS
from stable_diffusion.training.observers import JsonLines
from stable_diffusion.training.pace import Pace
from stable_diffusion.training.stage import Stage

FORMAT = 2  # grows when runs of older versions can no longer go on
PAYS = {"cpu": 600.0, "cuda": 150.0}  # seconds of a stage from which compiling pays, which takes 150, or 60
LONG = (
    500  # steps: where fewer take so many seconds, the machine may just have been busy as they were measured
)
DAMAGED = "whose run.json is damaged or gone"


class RunRecord:
    """The content of ``run.json``, the log beside it, and the time that the run has taken, earlier calls included.

    Args:
        folder: the run's.
        facts: what the file says of a new run; its ``identity`` must be the same for a run to go on.
        resume: whether to go on with the run in the folder; its files are removed otherwise.
        computer: measures the stages; of its processes, the first one writes.

    Raises:
        InputError: another run is in the folder, or one of an older version.
    """

    def __init__(self, folder: Path, facts: Mapping[str, object], resume: bool, computer: Computer) -> None:
        self.path, self.computer, self.stages = folder / "run.json", computer, [*computer.functions]
        self.clock, self.writes = computer.clock, computer.process == 0
        self.content: dict[str, Any] = {"format": FORMAT, **facts}
        self.content |= {"asked": None, "plan": {}, "figures": {}, "spent": 0.0}
        checkpoints = [*map(self.checkpoint, self.stages)]
        if resume and any(file.exists() for file in (self.path, *checkpoints)):
            try:
                self.content = read_json(self.path)
            except InputError as error:
                if isinstance(error.__cause__, PermissionError):
                    raise
                self.content = {}
            if other := self._other(facts):
                raise _occupied(folder, other)
        self.log = JsonLines(folder / "log.jsonl", self.spent)
        self.began = self.clock() - self.content["spent"]
        computer.state.wait_for_everyone()  # all have read the record before one writes it
        if self.writes and not resume:
            for file in (*checkpoints, self.log.path, self.path):  # a checkpoint is never without its record
                file.unlink(missing_ok=True)

    def _other(self, facts: Mapping[str, object]) -> str:
        """Whose record it is, in words; nothing where this training can go on with it."""
        content = self.content
        if content and content.get("format") != FORMAT:
            return "of another version, which cannot go on here"
        if not _is_sound(content):
            return DAMAGED
        if content["data"] != facts["data"]:
            return "of other pictures or captions"
        if content.get("identity") != facts["identity"]:
            return "of another recipe, model or seed"
        names = {stage.settings.name for stage in self.stages}
        return "" if content["plan"].keys() == (names if content["asked"] else set()) else DAMAGED

    def checkpoint(self, stage: Stage) -> Path:
        """The file that a stage goes on from."""
        return self.path.with_name(f"{stage.settings.name}.safetensors")

    def spent(self) -> float:
        """Seconds of training, without what prepares it."""
        return self.clock() - self.began

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time within it does not count as spent."""
        spent = self.spent()
        try:
            yield
        finally:
            self.began = self.clock() - spent

    def plan(self, steps: int | None, minutes: float | None) -> dict[str, dict[str, Any]]:
        """Steps of each stage, and the seconds of one.

        As planned before, unless another length is asked for; none means the rest of a run that was stopped, and the
        recipe's length for one that is through: a short trial is not the whole training.
        """
        plan, asked = self.content["plan"], {"steps": steps, "minutes": minutes}
        goes_on = steps is minutes is None and not plan.keys() <= self.content["figures"].keys()
        if self.content["asked"] != asked and not goes_on:
            pictures = self.content["data"]["pictures"]
            for stage in self.stages:
                settings, known = stage.settings, plan.get(stage.settings.name)
                seconds = known["seconds"] if known else self.computer.measure(stage)
                length = max(settings.min_steps, round(settings.epochs * pictures / settings.batch_size))
                if minutes is not None:
                    length = max(1, int(60 * minutes * _part(stage, self.stages) / seconds))
                length = steps or length
                pays = length >= LONG and length * seconds >= PAYS.get(self.computer.device.type, 600.0)
                plan[settings.name] = {"steps": length, "seconds": seconds, "compiled": pays}
            self.content["asked"] = asked
        if self.computer.compiler is not None:
            # As it was before, where a run goes on: another rounding would not be the same training.
            self.computer.compiled = {
                one for one in self.stages if plan[one.settings.name].get("compiled", True)
            }
        self.write()
        return plan

    def pace(self, stage: Stage) -> Pace:
        """A stage's pace, as planned; of a budget in minutes, it shares what is left with those after it."""
        minutes, seconds = self.content["asked"]["minutes"], None
        planned = self.content["plan"][stage.settings.name]
        if minutes is None:
            return Pace(stage.settings, planned["steps"], clock=self.clock)
        if "until" not in planned:
            rest = 60 * minutes - self.spent()
            planned["until"] = self.spent() + rest * _part(stage, self.stages[self.stages.index(stage) :])
            seconds = self.computer.measure(stage)
        return Pace(
            stage.settings, planned["steps"], lambda: planned["until"] - self.spent(), self.clock, seconds
        )

    def note(self, event: Event) -> None:
        """Keeps what a stage says: a step in the log, another plan in ``run.json``."""
        due = self.spent() - self.content["spent"] > SAVE_SECONDS
        if isinstance(event, Replan):
            self.content["plan"][event.stage] |= {"steps": event.steps, "seconds": event.seconds}
            due = True
        if self.writes:
            self.log(event)
        if due:
            self.write()

    def finish(self, stage: Stage, done: bool) -> None:
        """Keeps the figures of a stage that was trained to its end in this call, or in one that was then killed."""
        name = stage.settings.name
        if done and self.writes and (self.log.stage == name or name not in self.content["figures"]):
            self.content["figures"][name] = self.log.figures(name, stage.settings.batch_size)
        self.write()

    def write(self) -> None:
        """Writes ``run.json``."""
        self.content["spent"] = round(self.spent(), 3)
        if self.writes:
            write_json(self.path, self.content)


def _is_sound(content: Mapping[str, Any]) -> bool:
    """Whether a record has all that is read of one."""

    def has(table: object, kinds: Mapping[str, Any]) -> bool:
        return isinstance(table, dict) and all(
            isinstance(table.get(key), kind) for key, kind in kinds.items()
        )

    kinds = {"asked": dict | None, "plan": dict, "figures": dict, "spent": float, "data": dict}
    length = {"steps": int | None, "minutes": int | float | None}
    planned = {"steps": int, "seconds": int | float}
    return (
        has(content, kinds)
        and has(content["asked"] or {}, length)
        and all(has(stage, planned) for stage in content["plan"].values())
    )


def _occupied(folder: Path, other: str) -> InputError:
    """The error for a folder that another training has."""
    said, model = f"{folder} holds a training {other}: choose another", folder / "model"
    library = command = ""
    if "pictures" in other and model.is_dir():
        library = f", with DiffusionModel.from_pretrained({str(model)!r}) to train its model further,"
        command = f", with --start {model} to train its model further,"
    return InputError(
        f"{said} output_dir{library} or resume=False to replace it",
        f"{said} --output{command} or --fresh to replace it",
    )


def _part(stage: Stage, stages: Sequence[Stage]) -> float:
    """A stage's part of the time that these stages have."""
    return stage.share / sum(other.share for other in stages)


def facts(
    config: ModelConfig, entries: Sequence[Entry], recipe: Mapping[str, object], computer: Computer
) -> dict[str, Any]:
    """What a run is: recipe, with its seed, data and machine; and a digest of what must stay for it to go on."""
    rows = [(entry.key, tuple(entry.captions), entry.weight) for entry in entries]
    data = {"pictures": len(rows), "captions": sum(len(row[1]) for row in rows), "digest": digest(rows)}
    model, said = to_dict(config), [to_dict(stage.settings) for stage in computer.functions]
    trained = ("sample_size", "vae", "unet", "text_encoders", "schedule")  # not prompts nor samplers
    return {
        "identity": digest(data, recipe["seed"], said, [model[name] for name in trained]),
        "recipe": {**recipe, "stage": said, "model": model},
        "data": data,
        "machine": _machine(computer),
    }


def _machine(computer: Computer) -> dict[str, object]:
    """Where it is computed, and with what."""
    info, device = Path("/proc/cpuinfo"), computer.device
    named = re.search(r"model name\s*: (.+)", info.read_text(encoding="utf-8") if info.is_file() else "")
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    return {
        "processor": named[1].strip() if named else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "bf16": has_native_bf16(device),
        "number_format": computer.number_format,
        "versions": {"mini-stable-diffusion": version(), **versions},
    }
