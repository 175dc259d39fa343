"""The colours of things, on real drawings turned to each of them."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from stable_diffusion.data.icon_scenes import COLOURS as SCENE_COLOURS
from stable_diffusion.data.icon_sprites import turned
from stable_diffusion.data.oklab import to_oklab
from stable_diffusion.evaluation.colours import COLOURS, EXAMPLES, thing_colours
from tests.evaluation.real import NAMES, beside, sprite


def test_names_are_those_of_the_scenes() -> None:
    assert set(COLOURS) == set(SCENE_COLOURS)


def test_oklab_is_the_published_one() -> None:
    """Of white, red, green and blue, as the space's author gives them."""
    rgb = np.array([[1, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1]], dtype=float)
    known = [[1, 0, 0], [0.628, 0.225, 0.126], [0.866, -0.234, 0.179], [0.452, -0.032, -0.312]]
    np.testing.assert_allclose(to_oklab(rgb), known, atol=1e-3)


@pytest.mark.parametrize("colour", COLOURS)
def test_a_square_of_an_example_has_its_name(colour: str) -> None:
    for example in EXAMPLES[colour].split():
        ground = "#404080" if colour in ("white", "grey") else "white"
        image = Image.new("RGB", (64, 64), ground)
        image.paste(f"#{example}", (20, 20, 44, 44))
        assert thing_colours(np.asarray(image), [(18, 18, 46, 46)]) == [colour]


@pytest.mark.parametrize("colour", SCENE_COLOURS)
def test_drawings_of_all_kinds_turned_to_a_colour(colour: str) -> None:
    """Two at a time, each in its own box: outlines, eyes and seeds stay as they were and do not win."""
    pairs = list(zip(NAMES[::2], NAMES[1::2], strict=True))
    if colour == "white":
        pairs = pairs[:-1]  # a white line drawing on white is not there
    found = [
        found
        for a, b in pairs
        for found in thing_colours(
            beside([turned(sprite(a), colour), turned(sprite(b), "blue" if colour != "blue" else "red")]),
            [(2, 32, 63, 94), (65, 32, 126, 94)],
        )[:1]
    ]
    assert found.count(colour) >= len(pairs) - 1, found


def test_the_ground_is_no_thing() -> None:
    """The same thing has the same colour on grounds of any colour."""
    chick = turned(sprite("baby chick"), "green")
    for ground in ("white", "red", "black", "pink"):
        picture = beside([chick, "anchor"], ground=ground)
        assert thing_colours(picture, [(0, 30, 64, 98)]) == ["green"], ground
