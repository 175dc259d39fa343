"""Laws of what is ground in a picture."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from stable_diffusion.evaluation.ground import colours, ground


def test_ground_reaches_the_border() -> None:
    """Around a ring, into a hook's bay from any side, and not inside the ring."""
    image = Image.new("RGB", (40, 40), (250, 240, 230))
    pen = ImageDraw.Draw(image)
    pen.ellipse((12, 12, 28, 28), outline="black", width=2)
    pixels = np.asarray(image)[None]
    assert colours(pixels).tolist() == [[250, 240, 230]]
    found = ground(pixels, colours(pixels))[0]
    assert found[0, 0] and found[39, 20] and not found[20, 20] and not found[12, 20]
    assert not found[13:28, 13:28].all() and found.sum() < 40 * 40 - 150


def test_ground_winds_into_a_spiral() -> None:
    image = Image.new("RGB", (41, 41), "white")
    line = [(8, 40), (8, 4), (36, 4), (36, 36), (14, 36), (14, 10), (30, 10), (30, 30), (20, 30), (20, 16)]
    ImageDraw.Draw(image).line(line, fill="black")
    pixels = np.stack([np.rot90(np.asarray(image), turns) for turns in range(4)])
    found = ground(pixels, colours(pixels))
    assert (found == (pixels == 255).all(3)).all()
