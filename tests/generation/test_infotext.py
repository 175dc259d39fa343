"""Laws: what a text says of a picture is read back, whoever wrote it."""

from __future__ import annotations

import pytest

from stable_diffusion.generation.infotext import read_parameters
from stable_diffusion.generation.metadata import parameters

A1111 = (
    "a (fox:1.2), best: quality\nin two lines\nNegative prompt: blurry\nSteps: 20, Sampler: DPM++ 2M, Schedule type:"
    ' Karras, CFG scale: 7, Seed: 123, Size: 512x768, Lora hashes: "fox: 7c6bad, b: 1", Version: v1.10.1'
)
"""As a webui writes it."""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("a fox: red, small: 1", {"Prompt": "a fox: red, small: 1", "Negative prompt": ""}),
        (
            'Negative prompt: dark\nSteps: 1, Seed: 2, Note: "',
            {"Prompt": "", "Negative prompt": "dark", "Steps": "1", "Seed": "2", "Note": '"'},
        ),
        (
            A1111,
            {
                "Prompt": "a (fox:1.2), best: quality\nin two lines",
                "Negative prompt": "blurry",
                "Steps": "20",
                "Sampler": "DPM++ 2M",
                "Schedule type": "Karras",
                "CFG scale": "7",
                "Seed": "123",
                "Size-1": "512",
                "Size-2": "768",
                "Lora hashes": "fox: 7c6bad, b: 1",
                "Version": "v1.10.1",
            },
        ),
    ],
)
def test_settings_in_a_text(text: str, expected: dict[str, str]) -> None:
    assert read_parameters(text) == expected


def test_what_we_write_is_read() -> None:
    settings = {
        "prompt": "a fox",
        "negative_prompt": "a, b: c",
        "seed": 5,
        "width": 32,
        "height": 64,
        "model": "a, b",
    }
    assert read_parameters(parameters(settings)) == {
        "Prompt": "a fox", "Negative prompt": "a, b: c", "Seed": "5", "Size-1": "32", "Size-2": "64", "Model": "a, b",
    }  # fmt: skip


def test_a_hostile_text_takes_no_time() -> None:
    """A million characters, on which a careless expression would spend hours."""
    for text in ("a " * 500_000, " " * 1_000_000 + "x", 'a:"' * 300_000):
        read_parameters(text)
