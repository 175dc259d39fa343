"""Two processes that share each batch train what one process trains."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stable_diffusion.data.coco import CocoImageLoader
from tests.tiny import KL, TEXT, TINY, shapes, tiny_model
from tests.training.record import differing

# The light autoencoder normalises by the deviation of each process's part of the batch: not equal, by design.
CONFIG = replace(TINY, vae=KL, text_encoders=(replace(TEXT, trainable=True),))

SCRIPT = """
import sys
from pathlib import Path
from accelerate import PartialState
from stable_diffusion import CocoImageLoader
from tests.tiny import tiny_model
from tests.training.test_parallel import CONFIG
folder = Path(sys.argv[1])
data = CocoImageLoader(folder / "shapes/train", folder / "shapes/annotations/captions_train.json")
model = tiny_model(CONFIG)
model.train(data, output_dir=folder / "two", steps=int(sys.argv[2]))
assert PartialState().num_processes == 2
if PartialState().process_index == 1:
    model.save_pretrained(folder / "second")
"""


def launch(folder: Path, steps: int) -> str:
    root = Path(__file__).parents[2]
    (folder / "script.py").write_text(SCRIPT, encoding="utf-8")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launcher, str(folder / "script.py"), str(folder), str(steps)],
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join([str(root / "src"), str(root)])}
        | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_two_processes_are_one(tmp_path: Path) -> None:
    data: CocoImageLoader = shapes(tmp_path / "shapes")
    one = tiny_model(CONFIG)
    one.train(data, output_dir=tmp_path / "one", steps=3)
    output = launch(tmp_path, 3)
    assert output.count("training tiny on 9 pictures") == 1, "the first process speaks"
    for name in ("autoencoder", "denoiser"):
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
    launch(tmp_path, 5)  # both go on from the first one's checkpoint
    assert not differing(load_file(tmp_path / "two/model/unet/diffusion_pytorch_model.safetensors"),
                         load_file(tmp_path / "second/unet/diffusion_pytorch_model.safetensors"))  # fmt: skip
