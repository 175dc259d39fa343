"""Journeys with the model that the package carries: what a new user sees first."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from stable_diffusion import DiffusionModel
from stable_diffusion.data.shapes import COLOURS, PLACES, SHAPES, dominant_colour

GOLDEN = Path(__file__).parent / "golden" / "packaged.png"
PROMPTS = tuple(
    f"a large {colour} {shape} in the centre" for colour, shape in zip(COLOURS, [*SHAPES] * 2, strict=False)
)


@pytest.fixture(scope="module")
def model() -> DiffusionModel:
    return DiffusionModel.from_pretrained()


@pytest.fixture(scope="module")
def pictures(model: DiffusionModel) -> list[Image.Image]:
    return model.generate(PROMPTS, seed=100)


def figure(picture: Image.Image) -> np.ndarray:
    """Where the picture differs from its background, the colour of its edge."""
    pixels = np.asarray(picture, dtype=float)
    background = np.median(np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]), axis=0)
    return np.abs(pixels - background).max(axis=2) > 50


def cropped(mask: np.ndarray, side: int = 48) -> np.ndarray:
    """The figure at a fixed size."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    return np.asarray(Image.fromarray(mask).crop(box).resize((side, side)))


def drawn(shape: str) -> np.ndarray:
    """The figure of a shape of the table."""
    image = Image.new("1", (200, 200))
    outline, *holes = SHAPES[shape]
    for corners, value in ((outline, 1), *((hole, 0) for hole in holes)):
        ImageDraw.Draw(image).polygon([(100 + 90 * x, 100 + 90 * y) for x, y in corners], fill=value)
    return cropped(np.asarray(image))


def shape_of(picture: Image.Image) -> str | None:
    """The shape whose figure covers the picture's best."""
    mask = figure(picture)
    if mask.sum() < 20:
        return None
    found = cropped(mask)
    overlap = {name: (found & drawn(name)).sum() / (found | drawn(name)).sum() for name in SHAPES}
    return max(overlap, key=overlap.__getitem__)


def test_the_asked_colour(pictures: list[Image.Image]) -> None:
    """Nine of the ten colours of the table, at fixed seeds, are the asked ones."""
    right = [dominant_colour(picture) == colour for picture, colour in zip(pictures, COLOURS, strict=True)]
    assert sum(right) >= 9, dict(zip(COLOURS, right, strict=True))


def test_the_asked_shape(pictures: list[Image.Image]) -> None:
    """Eight of ten shapes at least, at fixed seeds, are the asked ones."""
    asked = [prompt.split()[3] for prompt in PROMPTS]
    found = [shape_of(picture) for picture in pictures]
    assert sum(a == b for a, b in zip(asked, found, strict=True)) >= 8, list(zip(asked, found, strict=True))


def test_the_asked_place(model: DiffusionModel) -> None:
    """A shape's middle is within a sixth of the picture's side of the asked place."""
    places = list(PLACES)
    pictures = model.generate([f"a medium blue circle in the {place}" for place in places], seed=7)
    near = []
    for place, picture in zip(places, pictures, strict=True):
        rows, columns = np.nonzero(figure(picture))
        middle = (columns.mean() / picture.width, rows.mean() / picture.height)
        near.append(np.abs(np.subtract(middle, PLACES[place])).max() < 1 / 6)
    assert sum(near) >= 8, dict(zip(places, near, strict=True))


def test_image_to_image_changes_what_is_asked(model: DiffusionModel) -> None:
    """A red circle becomes a blue one at high strength and stays nearly what it is at a low one."""
    (circle,) = model.generate("a large red circle in the centre", seed=100)
    prompt = "a large blue circle in the centre"
    (changed,) = model.generate(prompt, image=circle, strength=0.95, seed=1)
    (kept,) = model.generate(prompt, image=circle, strength=0.1, seed=1)
    assert dominant_colour(changed) == "blue"
    assert np.abs(np.asarray(kept, float) - np.asarray(circle, float)).mean() < 12


def test_inpainting_repaints_its_half(model: DiffusionModel) -> None:
    """Bytes outside the mask stay; something new appears inside."""
    (circle,) = model.generate("a medium red circle on the left", seed=3)
    mask = Image.new("L", circle.size)
    ImageDraw.Draw(mask).rectangle((72, 0, 128, 128), fill=255)
    prompt = "a medium red circle on the left and a medium blue square on the right"
    (both,) = model.generate(prompt, image=circle, mask_image=mask, strength=1.0, seed=5)
    before, after = np.asarray(circle), np.asarray(both)
    assert (before[:, :72] == after[:, :72]).all()
    assert np.abs(before[:, 72:].astype(int) - after[:, 72:]).max() > 100


def test_golden_pictures(model: DiffusionModel) -> None:
    """An update does not change old pictures: 99.9 % of the values within 2 of 255 of the stored ones.

    `make golden` draws them anew, for a new model or sampler; say so in the CHANGELOG.
    """
    golden = np.asarray(Image.open(GOLDEN), dtype=int)
    assert (np.abs(np.asarray(sheet(model), dtype=int) - golden) <= 2).mean() > 0.999


def sheet(model: DiffusionModel) -> Image.Image:
    """The golden pictures side by side: the model's own prompts."""
    pictures = model.generate(model.config.prompts, seed=1)
    image = Image.new("RGB", (sum(picture.width for picture in pictures), pictures[0].height))
    for i, picture in enumerate(pictures):
        image.paste(picture, (i * picture.width, 0))
    return image


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    sheet(DiffusionModel.from_pretrained()).save(GOLDEN)
    print(GOLDEN)
