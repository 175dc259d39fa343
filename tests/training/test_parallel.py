"""Processes that share each batch train what one process trains, in every stage."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from stable_diffusion.config import ModelConfig
from stable_diffusion.data.coco import CocoImageLoader
from stable_diffusion.training.draw import Draw
from stable_diffusion.training.stages import STAGES as KINDS
from stable_diffusion.training.stages import ContrastiveSettings
from stable_diffusion.training.workspace import Workspace
from tests.tiny import DECODER, KL, STAGES, TEXT, TINY, VQ, shapes, tiny_model
from tests.training.record import differing
from tests.training.test_stops import check_equal, counts

ALL = (*STAGES, DECODER)
CONTRASTIVE = ContrastiveSettings(batch_size=4)
JOINT = replace(TINY, text_encoders=(replace(TEXT, trainable=True),))
CASES: dict[str, tuple[ModelConfig, Any]] = {
    "autoencoder": (TINY, STAGES[0]),
    "autoencoder-kl": (replace(TINY, vae=KL), STAGES[0]),
    "autoencoder-vq": (replace(TINY, vae=VQ), STAGES[0]),
    "denoiser": (TINY, STAGES[1]),
    "denoiser-joint": (JOINT, STAGES[1]),
    "decoder": (TINY, DECODER),
    "contrastive": (TINY, CONTRASTIVE),
    "contrastive-uneven": (TINY, replace(CONTRASTIVE, batch_size=5)),
    "uneven": (TINY, replace(STAGES[0], batch_size=5)),
}


def gradients(case: str, data: CocoImageLoader, folder: Path, process: int, processes: int) -> dict[str, Any]:
    """Of a stage's loss on a batch that processes share, its networks in float64."""
    config, settings = CASES[case]
    model = tiny_model(config)
    stage: Any = KINDS[settings.kind].stage(model, settings)
    list(stage.prepare(Workspace(model, data, data.entries(), folder)))
    # A caption of two colours brings its swap: not as many in each process
    if settings.kind == "contrastive":
        stage.captions = [f"{caption} on red" for caption in stage.captions]
    with torch.no_grad():
        for parameter in model.unet.parameters():  # a new network predicts 0, and has no other gradients
            parameter.add_(0.01)
    stage.double()
    count, places = settings.batch_size, range(process, settings.batch_size, processes)
    batch = stage.batch(Draw(0, settings.name, 3, places, count))
    function = torch.nn.parallel.DistributedDataParallel(stage) if processes > 1 else stage
    terms = function(*(x.double() if x.is_floating_point() else x for x in batch))
    (sum(terms.values()) * processes * len(places) / count).backward()
    return {name: p.grad for name, p in stage.named_parameters() if p.grad is not None}


SCRIPT = """
import signal
import sys
from pathlib import Path
from accelerate import PartialState
from safetensors.torch import save_file
from stable_diffusion import CocoImageLoader
from tests.tiny import tiny_model
from tests.training.test_parallel import ALL, CASES, TINY, gradients
folder, steps = Path(sys.argv[1]), int(sys.argv[2])
data = CocoImageLoader(folder / "shapes/train", folder / "shapes/annotations/captions_train.json")
state = PartialState(cpu=True)
assert state.num_processes == 2
if steps == 0:
    for case in CASES:
        found = gradients(case, data, folder / case, state.process_index, 2)
        save_file(found, folder / f"{case}-{state.process_index}.safetensors")
else:
    model = tiny_model(TINY)

    def stop(step):
        if (step.stage, step.index, state.process_index) == ("denoiser", 1, 1) and sys.argv[3:]:
            signal.raise_signal(signal.SIGTERM)

    model.train(data, ALL, output_dir=folder / "two", steps=steps, callback=stop)
    if state.process_index == 1:
        model.save_pretrained(folder / "second")
"""


def launch(folder: Path, steps: int, *stop: str) -> str:
    root = Path(__file__).parents[2]
    (folder / "script.py").write_text(SCRIPT, encoding="utf-8")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launcher, str(folder / "script.py"), str(folder), str(steps), *stop],
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join([str(root / "src"), str(root)])}
        | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode != 0) is bool(stop), done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_shared_gradients_are_those_of_one_process(tmp_path: Path) -> None:
    """Batch statistics included, and where the parts of a batch are not equally large."""
    data = shapes(tmp_path / "shapes")
    launch(tmp_path, 0)
    for case in CASES:
        whole = gradients(case, data, tmp_path / case, 0, 1)
        for process in range(2):
            part = load_file(tmp_path / f"{case}-{process}.safetensors")
            assert whole.keys() == part.keys() and whole
            largest = max(value.abs().max() for value in whole.values())
            for name, value in whole.items():
                error = (part[name] - value).abs().max() / largest
                assert error < 1e-6, (case, name)  # losses and time features are float32


@pytest.mark.slow
def test_two_processes_are_one(tmp_path: Path) -> None:
    data: CocoImageLoader = shapes(tmp_path / "shapes")
    one = tiny_model(TINY)
    one.train(data, ALL, output_dir=tmp_path / "one", steps=3)
    output = launch(tmp_path, 3)
    assert output.count("training tiny on 9 pictures") == 1, "the first process speaks"
    for name in ("autoencoder", "denoiser", "decoder"):
        states = [load_file(tmp_path / run / f"{name}.safetensors") for run in ("one", "two")]
        assert states[0].keys() == states[1].keys()
        single, shared = (
            torch.cat(
                [value.flatten() for key, value in sorted(state.items()) if not key.startswith("optimizer")]
            )
            for state in states
        )
        # Adam makes a whole step even of a gradient that is nothing but rounding: a few weights in 10,000.
        difference = (single - shared).abs()
        assert (difference > 1e-4).float().mean() < 1e-3 and difference.max() < 5e-3
    first, second = (
        {
            path.relative_to(tmp_path / run): load_file(path)
            for path in (tmp_path / run).rglob("*.safetensors")
        }
        for run in ("two/model", "second")
    )
    assert first.keys() == second.keys() and not any(differing(first[path], second[path]) for path in first)
    logs = [(tmp_path / run / "log.jsonl").read_text().splitlines() for run in ("one", "two")]
    assert len(logs[0]) == len(logs[1]) == 9
    for a, b in zip(*([json.loads(line)["losses"] for line in log] for log in logs), strict=True):
        assert a == pytest.approx(b, rel=1e-3)
    launch(tmp_path, 5)  # both go on from the first one's checkpoint
    assert not differing(load_file(tmp_path / "two/model/unet/diffusion_pytorch_model.safetensors"),
                         load_file(tmp_path / "second/unet/diffusion_pytorch_model.safetensors"))  # fmt: skip


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_ends_both_after_the_same_step(tmp_path: Path) -> None:
    shapes(tmp_path / "shapes")
    launch(tmp_path, 4)
    (tmp_path / "two").rename(tmp_path / "straight")
    launch(tmp_path, 4, "stop")
    assert counts(tmp_path / "two/denoiser.safetensors")["step"] == "2"
    launch(tmp_path, 4)
    check_equal(tmp_path / "two", tmp_path / "straight")
