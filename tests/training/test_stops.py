"""A training that is stopped or killed, at whatever moment, ends as one that was not."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from stable_diffusion import InputError, cli, config
from stable_diffusion.data.coco import CocoImageLoader
from stable_diffusion.training import loop
from stable_diffusion.training.events import TrainStep
from stable_diffusion.training.run import train_model
from stable_diffusion.training.stages.denoiser import DenoiserStage
from tests.tiny import STAGES, TINY, shapes, tiny_model
from tests.training.record import Record, differing

POSIX = pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")


def lines(folder: Path) -> list[dict[str, Any]]:
    """The log without what depends on the time."""
    found = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("elapsed", "images_per_second")} for line in found]


def counts(checkpoint: Path) -> dict[str, str]:
    with safe_open(checkpoint, "pt") as file:
        return dict(file.metadata())


def hidden(folder: Path) -> set[Path]:
    """Files that something half-written leaves."""
    return {path for path in folder.rglob(".*") if path.name != ".lock"}


def check_equal(folder: Path, straight: Path) -> None:
    """Every bit of the model and of the checkpoints, every step of the log, once, and what was planned and found."""
    for file in straight.glob("*.safetensors"):
        assert differing(load_file(folder / file.name), load_file(file)) == []
        assert counts(folder / file.name) == counts(file)
    model = [path for path in (straight / "model").rglob("*") if path.is_file()]
    assert model and all(
        (folder / path.relative_to(straight)).read_bytes() == path.read_bytes() for path in model
    )
    assert lines(folder) == lines(straight)
    said = [json.loads((one / "run.json").read_text()) for one in (folder, straight)]
    assert said[0]["identity"] == said[1]["identity"]
    for name, figures in said[1]["figures"].items():
        assert said[0]["figures"][name]["losses"] == figures["losses"] and figures["steps"] > 0


# Killed, as processes.


def command(ready: Any, output: Path, folder: Path, run: str, steps: int) -> None:
    """``minisd train`` on a tiny model, in a process of its own."""
    with output.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    config.PRESETS["mini"] = replace(TINY, name="mini")
    loop.SAVE_SECONDS = 0.05  # so that kills meet saving too
    os.chdir(folder)
    data = ["--images", "shapes/train", "--captions", "shapes/annotations/captions_train.json"]
    ready.send(True)
    cli.main(["train", *data, "--output", run, "--steps", str(steps), "--no-autocast", "--device", "cpu"])


def check_kills(folder: Path, kills: int, seed: int, steps: int) -> None:
    """Kills trainings at random moments, until so many were killed; each then ends as one that was not."""
    lots, processes = random.Random(seed), multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([__name__])
    shapes(folder / "shapes")
    codes = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -signal.SIGKILL}
    output, killed, runs = folder / "output", 0, 0

    def start(run: str) -> Any:
        ready, sender = processes.Pipe(duplex=False)
        process = processes.Process(target=command, args=(sender, output, folder, run, steps))
        process.start()
        assert ready.poll(120)
        return process

    whole, began = start("straight"), time.monotonic()
    whole.join(600)
    assert whole.exitcode == 0, output.read_text()
    took = time.monotonic() - began
    while killed < kills:
        runs += 1
        run, done = folder / f"run{runs}", False
        while not done:
            logged = len(lines(run)) if (run / "log.jsonl").is_file() else 0
            left = hidden(folder)
            process = start(run.name)
            number = lots.choice(list(codes))
            process.join(0.02 + took * lots.random() ** 3 if killed < kills else 600)  # soon rather than late
            if process.exitcode is None:
                os.kill(process.pid, number)
                process.join(120)
            done = process.exitcode == 0
            if done:
                continue
            killed += 1
            assert process.exitcode == codes[number], output.read_text()
            if number != signal.SIGKILL:
                assert hidden(folder) <= left, "nothing half-written"
                if (run / "log.jsonl").is_file() and len(lines(run)) > logged:
                    last = lines(run)[-1]
                    kept = counts(run / f"{last['stage']}.safetensors")["step"]
                    assert kept == str(last["step"] + 1), "no step is lost"
        check_equal(run, folder / "straight")
        shutil.rmtree(run)
    said = output.read_text()
    assert "Traceback" not in said, said
    print(f"{killed} kills of {runs} trainings that take {took:.1f} s")


@POSIX
def test_a_few_kills(tmp_path: Path) -> None:
    check_kills(tmp_path, kills=4, seed=1, steps=6)


@POSIX
@pytest.mark.slow
def test_a_hundred_kills(tmp_path: Path) -> None:
    check_kills(tmp_path, kills=100, seed=0, steps=12)


# Asked to stop, in Python.


@pytest.fixture(scope="module")
def straight(data: CocoImageLoader, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    tiny_model().train(data, STAGES, output_dir=folder, steps=6)
    return folder


def at(stage: str, index: int, action: Callable[[], object]) -> Callable[[TrainStep], None]:
    """A callback that does something after a step."""

    def callback(step: TrainStep) -> None:
        if (step.stage, step.index) == (stage, index):
            action()

    return callback


@pytest.mark.parametrize(
    ("stage", "index"),
    [("reading pictures", 3), ("autoencoder", 2), ("encoding captions", 0), ("denoiser", 5)],
)
def test_ctrl_c_ends_a_training_after_its_step(
    tmp_path: Path, data: CocoImageLoader, straight: Path, stage: str, index: int
) -> None:
    before, record = signal.getsignal(signal.SIGINT), Record()
    with pytest.raises(KeyboardInterrupt):
        tiny_model().train(
            data, STAGES, output_dir=tmp_path, steps=6, observers=[record],
            callback=at(stage, index, lambda: signal.raise_signal(signal.SIGINT)),
        )  # fmt: skip
    last = record.events[-1]
    assert isinstance(last, TrainStep) and (last.stage, last.index) == (stage, index)
    assert signal.getsignal(signal.SIGINT) is before and not hidden(tmp_path)
    if last.losses:
        assert counts(tmp_path / f"{stage}.safetensors")["step"] == str(index + 1)
    else:
        assert not list((tmp_path / "cache").glob(f"{'pictures' if index else 'captions'}*"))
    tiny_model().train(data, STAGES, output_dir=tmp_path, steps=6)
    check_equal(tmp_path, straight)


def test_a_signal_within_a_step_waits_for_its_end_and_a_second_one_does_not(
    tmp_path: Path, data: CocoImageLoader, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forward, signals = DenoiserStage.forward, [0] * 3 + [0, 1, 0, 2]  # three are measured

    def interrupted(stage: Any, *batch: Any) -> Any:
        for _ in range(signals.pop(0)):
            signal.raise_signal(signal.SIGINT)
        return forward(stage, *batch)

    monkeypatch.setattr(DenoiserStage, "forward", interrupted)
    for kept in ("2", "2"):
        with pytest.raises(KeyboardInterrupt):
            tiny_model().train(data, STAGES, output_dir=tmp_path, steps=6)
        assert counts(tmp_path / "denoiser.safetensors")["step"] == kept
    assert capsys.readouterr().err.count("stopping after this step; another signal stops at once") == 2
    assert signals == [] and not hidden(tmp_path)


def test_the_callers_own_handlers_have_the_last_word(
    tmp_path: Path, data: CocoImageLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A handler that raises nothing is as a callback that stops; what is ignored stays so; threads have no handlers."""
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    try:
        terminate = at("denoiser", 1, lambda: signal.raise_signal(signal.SIGTERM))
        assert tiny_model().train(data, STAGES, output_dir=tmp_path, steps=3, callback=terminate) is None
        assert heard == [signal.SIGTERM] and not (tmp_path / "model").exists()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        again = at("denoiser", 2, lambda: signal.raise_signal(signal.SIGTERM))
        tiny_model().train(data, STAGES, output_dir=tmp_path, steps=3, callback=again)
        assert (tmp_path / "model").is_dir()
    finally:
        signal.signal(signal.SIGTERM, before)
    thread = threading.Thread(
        target=lambda: tiny_model().train(data, STAGES, output_dir=tmp_path / "b", steps=1)
    )
    thread.start()
    thread.join()
    assert (tmp_path / "b/model").is_dir()


@POSIX
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["generate"], ""),
        (["train"], "; run the same command again to continue"),
        (["train", "--fresh"], "; run the same command without --fresh again to continue"),
        (["evaluate"], "; run the same command again to continue"),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_the_commands_last_words(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
    name: str,
    code: int,
) -> None:
    def works(fresh: bool = False) -> None:
        signal.raise_signal(getattr(signal, name))

    before = signal.getsignal(getattr(signal, name))
    monkeypatch.setitem(cli.COMMANDS, arguments[0], works)
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == code and capsys.readouterr().err == f"minisd: stopped{said}\n"
    assert signal.getsignal(getattr(signal, name)) is before


# Two at a time.


def test_a_second_training_in_the_folder_is_refused(tmp_path: Path, data: CocoImageLoader) -> None:
    first = train_model(tiny_model(), data, STAGES, output_dir=tmp_path, steps=2)
    next(first)
    for settings in ({}, {"resume": False}):
        with pytest.raises(InputError) as refused:
            tiny_model().train(data, STAGES, output_dir=tmp_path, steps=2, **settings)
        other = f"another training (process {os.getpid()}): wait until it ends, or choose another"
        said = f"{tmp_path} is in use by {other}"
        assert str(refused.value) == f"{said} output_dir" and refused.value.command == f"{said} --output"
    first.close()
    tiny_model().train(data, STAGES, output_dir=tmp_path, steps=2)
    assert (tmp_path / "model").is_dir()
