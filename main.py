"""Trains a model on a folder of captioned images in COCO format: the README's sample as a script.

Use: ``python main.py IMAGE_FOLDER CAPTIONS_FILE``
"""

from __future__ import annotations

import sys

import torch

from stable_diffusion import CocoImageLoader, DiffusionModel, InputError
from stable_diffusion.utils import Config


def main(image_folder: str, captions_file: str) -> None:
    """Trains the mini model into ``runs/mini``, on the best device that is there."""
    config = Config()
    if "cuda" in config.DEVICE:
        torch.set_float32_matmul_precision("high")
    data_loader = CocoImageLoader(image_folder, captions_file)
    model = DiffusionModel()
    model.to(config.DEVICE)
    model = torch.compile(model)  # type: ignore[assignment] # a wrapper that passes everything on
    model.train(data_loader, autocast=True)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python main.py IMAGE_FOLDER CAPTIONS_FILE")
    try:
        main(*sys.argv[1:])
    except InputError as error:
        print(f"main.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("main.py: stopped; run it again to continue", file=sys.stderr)
        sys.exit(130)
