"""Trains the detector that judges pictures of icons, `src/stable_diffusion/weights/detector/`.

    minisd data icons --out datasets/icons-128
    python tools/train_detector.py datasets/icons-128

From all plain drawings of the set, held-out ones too: it is to know every thing by sight, and what a model has learned
is asked of the model. It composes its own scenes and sees no generated picture. About half an hour on one core with
bfloat16; the same seed and machine give the same weights.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from stable_diffusion import DiffusionModel
from stable_diffusion.data.coco import coco_splits
from stable_diffusion.evaluation.detector import FOLDER, NAMES, WEIGHTS, Detector
from stable_diffusion.evaluation.detector_training import BATCH, STEPS, plain_drawings, train
from stable_diffusion.evaluation.features import load_network
from stable_diffusion.runtime import keep_freed_memory

EACH = 50  # steps between two lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="folder of the icons' set")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the weights")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--batch", type=int, default=BATCH, help="scenes a step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", help="whose autoencoder spoils some scenes; by default the packaged one")
    options = parser.parse_args(arguments)
    keep_freed_memory()
    vae = DiffusionModel.from_pretrained(options.model).vae.requires_grad_(False)
    sprites, names = plain_drawings(coco_splits(options.data))
    print(f"{len(sprites)} drawings of {len(names)} objects", flush=True)
    steps = train(
        sprites, names, vae, load_network(), steps=options.steps, batch=options.batch, seed=options.seed
    )
    sums: dict[str, float] = {}
    began = time.monotonic()
    while True:
        try:
            step, losses = next(steps)
        except StopIteration as end:
            detector: Detector = end.value
            break
        sums = {name: sums.get(name, 0.0) + value for name, value in losses.items()}
        if step.done % EACH == 0 or step.done == step.total:
            count = (step.done - 1) % EACH + 1
            rate = step.done * options.batch / (time.monotonic() - began)
            means = ", ".join(f"{name} {value / count:.3f}" for name, value in sums.items())
            print(f"step {step.done} of {step.total}: {means}; {rate:.0f} scenes a second", flush=True)
            sums = {}
    write(detector, options.out)
    print(options.out)


def write(detector: Detector, folder: Path) -> None:
    """The weights in 16 bits, and the names of the classes."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        name: tensor.to(torch.float16).contiguous() if tensor.is_floating_point() else tensor
        for name, tensor in detector.state_dict().items()
    }
    save_file(state, folder / WEIGHTS, {"format": "pt"})
    text = json.dumps(list(detector.names), ensure_ascii=False, indent=0)
    (folder / NAMES).write_text(text + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
