"""Swapped captions: what changes places, and which captions have no swap."""

from __future__ import annotations

import pytest

from stable_diffusion.data.swaps import swapped


@pytest.mark.parametrize(
    ("caption", "swap"),
    [
        ("a red drum and a blue fox", "a blue drum and a red fox"),
        ("an orange drum on a red background", "a red drum on an orange background"),
        ("two red drums and a red fox above a gray cat", "two gray drums and a gray fox above a red cat"),
        ("a fox that is pink and a white cat, noto style", "a fox that is white and a pink cat, noto style"),
        ("a black line drawing of a red cat on blue", "a black line drawing of a blue cat on red"),
        ("a red drum", None),
        ("a drum and a fox", None),
        ("a red drum, a blue fox and a pink cat", None),
        ("a black and white pictogram of a drum", None),
        ("a red and blue flag", None),
        ("hundred redwood oranges", None),
    ],
)
def test_two_colours_change_places(caption: str, swap: str | None) -> None:
    assert swapped(caption) == swap
    assert swap is None or swapped(swap) == caption
