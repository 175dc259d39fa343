"""How often the packaged model draws what is asked: colour, shape, and two shapes told apart.

    python -m benchmarks.shapes

Every colour with every shape once, large and in the middle; then every colour beside the next one.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from stable_diffusion import DiffusionModel
from stable_diffusion.data.shapes import COLOURS, SHAPES, dominant_colour
from tests.test_packaged import shape_of


def main() -> None:
    model = DiffusionModel.from_pretrained()
    pairs = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    pictures = draw(model, [f"a large {colour} {shape} in the centre" for colour, shape in pairs])
    colours = [
        dominant_colour(picture) == colour for picture, (colour, _) in zip(pictures, pairs, strict=True)
    ]
    shapes = [shape_of(picture) == shape for picture, (_, shape) in zip(pictures, pairs, strict=True)]
    print(
        f"one shape, {len(pairs)} pictures: colour right {np.mean(colours):.2f}, shape right {np.mean(shapes):.2f}"
    )

    names = list(COLOURS)
    beside = [(left, names[(i + step) % len(names)]) for step in (1, 3, 4) for i, left in enumerate(names)]
    prompts = [f"a {left} circle on the left and a {right} square on the right" for left, right in beside]
    right = []
    for picture, asked in zip(draw(model, prompts), beside, strict=True):
        middle = picture.width // 2
        halves = (picture.crop((0, 0, middle, picture.height)), picture.crop((middle, 0, *picture.size)))
        right += [dominant_colour(half) == colour for half, colour in zip(halves, asked, strict=True)]
    print(f"two shapes, {len(beside)} pictures: colour right on its side {np.mean(right):.2f}")


def draw(model: DiffusionModel, prompts: list[str]) -> list[Image.Image]:
    """One picture a prompt, seeds from 0, ten at a time."""
    batches = range(0, len(prompts), 10)
    return [picture for i in batches for picture in model.generate(prompts[i : i + 10], seed=i)]


if __name__ == "__main__":
    main()
