"""What a run leaves to be read: the log of its steps, `run.json`, TensorBoard."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from stable_diffusion import InputError
from stable_diffusion.data.coco import CocoImageLoader
from stable_diffusion.training.compute import Computer
from stable_diffusion.training.events import Plan, Replan, TrainStep
from stable_diffusion.training.observers import TensorBoard
from stable_diffusion.training.run import train_model
from stable_diffusion.training.stages.denoiser import DenoiserStage
from stable_diffusion.training.workspace import Workspace
from tests.tiny import DECODER, STAGES, tiny_model
from tests.training.record import Record

ALL = (*STAGES, DECODER)


def train(folder: Path, data: CocoImageLoader, **settings: Any) -> Record:
    record = settings.pop("record", None) or Record()
    stages = settings.pop("stages", ALL)
    tiny_model().train(data, stages, output_dir=folder, observers=[record], **settings)
    return record


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_the_log_has_a_line_a_step(tmp_path: Path, data: CocoImageLoader) -> None:
    record = train(tmp_path, data, steps=4)
    steps = [event for event in record.events if isinstance(event, TrainStep) and event.losses]
    found = lines(tmp_path)
    assert [(line["stage"], line["step"]) for line in found] == [(step.stage, step.index) for step in steps]
    for line, step in zip(found, steps, strict=True):
        assert line["losses"] == step.losses and line["learning_rates"] == step.learning_rates
        assert (line["total"], line["skipped"]) == (4, 0) and line["images_per_second"] > 0
    assert [line["elapsed"] for line in found] == sorted(line["elapsed"] for line in found)
    names = {line["stage"]: tuple(line["losses"]) for line in found}
    assert names == {
        "autoencoder": ("pixels", "edges", "pooled"),
        "denoiser": ("prediction",),
        "decoder": ("pixels", "edges", "fooling", "discriminator"),
    }
    assert list(found[-1]["learning_rates"]) == ["decoder", "discriminator"]


def test_no_step_stands_twice_after_a_run_was_killed(tmp_path: Path, data: CocoImageLoader) -> None:
    """Steps beyond the checkpoint are logged, then taken again."""
    train(tmp_path, data, steps=6, record=Record("denoiser", 2))
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write(json.dumps(lines(tmp_path)[-1] | {"step": 3, "losses": {"lost": 1.0}}) + "\n")
        file.write('{"stage": "denoiser", "st')
    train(tmp_path, data, steps=6)
    found = lines(tmp_path)
    assert [(line["stage"], line["step"]) for line in found] == [
        (stage.name, step) for stage in ALL for step in range(6)
    ]
    assert not any("lost" in line["losses"] for line in found)
    train(tmp_path, data, steps=6, resume=False)
    assert len(lines(tmp_path)) == 18


def test_run_json_says_what_was_run(tmp_path: Path, data: CocoImageLoader) -> None:
    train(tmp_path, data, steps=3, seed=5, about={"data": {"source": "shapes"}})
    said = json.loads((tmp_path / "run.json").read_text())
    assert said["recipe"]["seed"] == 5 and said["recipe"]["data"] == {"source": "shapes"}
    assert [stage["kind"] for stage in said["recipe"]["stage"]] == ["autoencoder", "denoiser", "decoder"]
    assert said["recipe"]["model"]["name"] == "tiny" and "training" not in said["recipe"]["model"]
    assert said["machine"]["versions"]["torch"] == torch.__version__
    assert said["data"]["pictures"] == 9 and len(said["data"]["digest"]) == 16
    assert said["machine"]["processor"] and said["machine"]["cores"] and said["machine"]["device"] == "cpu"
    assert isinstance(said["machine"]["bf16"], bool) and said["spent"] > 0
    for stage in ALL:
        figures = said["figures"][stage.name]
        mean = [line["losses"] for line in lines(tmp_path) if line["stage"] == stage.name]
        assert figures["steps"] == 3 and figures["seconds"] > 0 and figures["images_per_second"] > 0
        for name, value in figures["losses"].items():
            assert value == pytest.approx(sum(losses[name] for losses in mean) / 3)


def test_a_folder_of_an_older_version_is_refused(tmp_path: Path, data: CocoImageLoader) -> None:
    (tmp_path / "run.json").write_text('{"identity": "a", "steps": {}, "seconds": {}, "minutes": null}')
    message = r"another version, which cannot go on.* resume=False to replace it"
    with pytest.raises(InputError, match=message):
        train(tmp_path, data, steps=1)
    train(tmp_path, data, steps=1, resume=False)


def test_two_stages_of_a_kind_have_names_of_their_own(tmp_path: Path, data: CocoImageLoader) -> None:
    with pytest.raises(InputError, match="two stages have the name 'denoiser'"):
        train(tmp_path / "a", data, stages=(STAGES[1], STAGES[1]))
    record = train(tmp_path, data, stages=(STAGES[1], replace(STAGES[1], name="again")), steps=2)
    assert (tmp_path / "again.safetensors").is_file()
    losses = [[step.loss for step in record.stage(name)] for name in ("denoiser", "again")]
    assert len(losses[0]) == len(losses[1]) == 2 and losses[0] != losses[1]


# TensorBoard.


def test_tensorboard_gets_every_loss(
    tmp_path: Path, data: CocoImageLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[tuple[str, float, int]] = []

    class Writer:
        def __init__(self, folder: str) -> None:
            self.folder = folder

        def add_scalar(self, *scalar: Any) -> None:
            written.append(scalar)

        def flush(self) -> None:
            written.append(("flush", 0, 0))

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    board = TensorBoard(tmp_path / "board")
    tiny_model().train(data, STAGES, output_dir=tmp_path, steps=2, observers=[board])
    names = {name for name, _, _ in written}
    assert names >= {"autoencoder/loss", "autoencoder/loss/edges", "denoiser/learning_rate/denoiser", "flush"}
    assert [step for name, _, step in written if name == "denoiser/loss"] == [0, 1]


def test_without_tensorboard_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match=r"pip install 'mini-stable-diffusion\[tensorboard\]'"):
        TensorBoard(tmp_path)


# A budget in minutes, over a whole run.


class Work:
    """A clock of which each update takes a second, or twenty while the machine is busy."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, busy: float) -> None:
        self.now, self.busy = 0.0, busy
        for name in ("AutoencoderStage", "DenoiserStage"):
            self._count(
                getattr(__import__("stable_diffusion.training.stages", fromlist=[name]), name), monkeypatch
            )

    def _count(self, stage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        forward = stage.forward

        def counted(module: Any, *batch: Any) -> Any:
            self.now += 20.0 if self.now < self.busy else 1.0
            return forward(module, *batch)

        monkeypatch.setattr(stage, "forward", counted)

    def __call__(self) -> float:
        return self.now


def test_a_busy_start_costs_only_its_own_time(
    tmp_path: Path, data: CocoImageLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Work(monkeypatch, busy=90.0)
    model = tiny_model()
    events = list(train_model(model, data, STAGES, output_dir=tmp_path, minutes=20.0, clock=clock))
    first = events[0]
    assert isinstance(first, Plan) and first.steps["autoencoder"] < 12, "measured while busy"
    counts = {
        name: sum(isinstance(e, TrainStep) and e.stage == name and bool(e.losses) for e in events)
        for name in ("autoencoder", "denoiser")
    }
    assert 140 < counts["autoencoder"] < 180 and 850 < counts["denoiser"] < 1020
    assert 1100 < clock.now < 1300, "of 1200 seconds"
    assert any(isinstance(event, Replan) for event in events)
    said = json.loads((tmp_path / "run.json").read_text())
    assert said["plan"]["denoiser"]["steps"] == counts["denoiser"]


def test_what_prepares_a_stage_takes_nothing_from_a_budget(
    tmp_path: Path, data: CocoImageLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading pictures and captions may take longer than the minutes that were asked for."""
    clock, prepare = Work(monkeypatch, busy=0.0), DenoiserStage.prepare

    def slowly(stage: DenoiserStage, workspace: Workspace) -> Iterator[TrainStep]:
        clock.now += 1000.0
        yield from prepare(stage, workspace)

    monkeypatch.setattr(DenoiserStage, "prepare", slowly)
    events = list(train_model(tiny_model(), data, STAGES, output_dir=tmp_path, minutes=2.0, clock=clock))
    steps = [event for event in events if isinstance(event, TrainStep) and event.stage == "denoiser"]
    assert 85 < len(steps) < 110, "of 120 seconds, 85 % are the denoiser's"
    assert json.loads((tmp_path / "run.json").read_text())["spent"] < 130


def test_a_changed_plan_goes_on_after_a_stop(
    tmp_path: Path, data: CocoImageLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time that was spent counts, pauses do not, and the plan is the changed one."""
    clock = Work(monkeypatch, busy=100.0)
    training = train_model(tiny_model(), data, STAGES, output_dir=tmp_path, minutes=5.0, clock=clock)
    for event in training:
        if isinstance(event, TrainStep) and (event.stage, event.index) == ("denoiser", 50):
            training.close()
    total, before = event.total, clock.now  # type: ignore[union-attr]
    clock.now += 100_000
    monkeypatch.setattr(Computer, "measure", lambda *_: pytest.fail("measured again"))
    events = list(train_model(tiny_model(), data, STAGES, output_dir=tmp_path, clock=clock))
    steps = [event for event in events if isinstance(event, TrainStep) and event.losses]
    assert steps[0].index == 51 and steps[0].total == total
    assert 280 < before + clock.now - 100_000 - before < 330


def test_a_damaged_record_is_refused(tmp_path: Path, data: CocoImageLoader) -> None:
    train(tmp_path, data, steps=1)
    content = json.loads((tmp_path / "run.json").read_text())
    for broken in ({"plan": []}, {"spent": "x"}, {"figures": None}, {"asked": 3}):
        (tmp_path / "run.json").write_text(json.dumps(content | broken))
        with pytest.raises(InputError, match=r"whose run\.json is damaged"):
            train(tmp_path, data, steps=1)


def test_no_stage_at_all(tmp_path: Path, data: CocoImageLoader) -> None:
    with pytest.raises(InputError, match="no stage to train"):
        train(tmp_path, data, stages=())
