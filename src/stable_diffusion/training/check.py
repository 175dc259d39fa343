"""The overfit check: whether a set-up can learn eight pictures by heart, before hours go into all of them."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from stable_diffusion import images
from stable_diffusion.data.cache import Array
from stable_diffusion.data.item import Entry, Source
from stable_diffusion.errors import InputError
from stable_diffusion.generation import pipeline
from stable_diffusion.generation.request import Request
from stable_diffusion.training.events import Event
from stable_diffusion.training.run import train_model
from stable_diffusion.training.stage import StageSettings
from stable_diffusion.training.stages import DEFAULT
from stable_diffusion.training.workspace import TrainableParts

PICTURES = 8
STEPS = {"autoencoder": 800, "denoiser": 1600}  # of the stages that it takes; pictures need not be sharp
ENOUGH = 7  # prompts of the eight that must render their own picture


@dataclass(frozen=True)
class Verdict:
    """The outcome of a check."""

    right: int
    """Prompts whose picture is nearer to their own training picture than to any other."""
    pictures: int
    error: float
    """Root mean square distance of the rendered pictures to the right ones, in pixel values of 255."""

    @property
    def learns(self) -> bool:
        return self.right >= min(ENOUGH, self.pictures)

    def __str__(self) -> str:
        failed = "the set-up does NOT learn: look at the pictures, the captions and the stages' losses first"
        outcome = "the set-up learns" if self.learns else failed
        right = f"{self.right} of {self.pictures} prompts render their own picture"
        return f"{right} (error {self.error:.0f} of 255): {outcome}"


class _Few:
    """Some pictures of a set, each with one caption that no other has."""

    def __init__(self, data: Source, count: int) -> None:
        self.image = data.image
        self.chosen: dict[str, Entry] = {}
        for entry in data.entries():
            new = [caption for caption in entry.captions if caption not in self.chosen]
            if new and len(self.chosen) < count:
                caption = max(new, key=len)
                self.chosen[caption] = replace(entry, captions=(caption,), weight=1.0)

    def entries(self) -> list[Entry]:
        return list(self.chosen.values())


def check_stages(stages: Sequence[StageSettings]) -> list[StageSettings]:
    """Those of these stages that the check takes, long enough for eight pictures."""
    whole: dict[str, Any] = {"batch_size": PICTURES, "gradient_accumulation_steps": 1, "epochs": 1.0}
    taken = [settings for settings in stages if settings.kind in STEPS]
    return [replace(settings, min_steps=STEPS[settings.kind], **whole) for settings in taken]


def overfit(
    parts: TrainableParts,
    data: Source,
    stages: Sequence[StageSettings] | None = None,
    *,
    output_dir: Path,
    autocast: bool = False,
) -> Generator[Event | Verdict, None, None]:
    """Trains `parts` on eight pictures, and generates them from their captions.

    Raises:
        InputError: fewer than two pictures with captions of their own.
    """
    few = _Few(data, PICTURES)
    entries, size = few.entries(), parts.config.sample_size
    if len(entries) < 2:
        raise InputError(
            f"the check needs at least 2 pictures with captions of their own, got {len(entries)}"
        )
    taken = check_stages(DEFAULT if stages is None else stages)
    yield from train_model(parts, few, taken, output_dir=output_dir, resume=False, autocast=autocast)
    prompts = [entry.captions[0] for entry in entries]
    request = Request.of(parts.config, prompt=prompts, seed=0, guidance_scale=1.0)
    steps = pipeline.stream(parts, request, pipeline.plan(parts, request))
    rendered = _array([images.to_rgb(picture) for picture in pipeline.finished(steps).pictures])
    wanted = _array([images.cover(few.image(entry.key), size, size) for entry in entries])
    distances = ((rendered[:, None] - wanted[None]) ** 2).mean(axis=(2, 3, 4)) ** 0.5
    right = int((distances.argmin(axis=1) == np.arange(len(entries))).sum())
    yield Verdict(right, len(entries), float(distances.diagonal().mean()))


def _array(pictures: Sequence[Image.Image]) -> Array:
    return np.stack([np.asarray(picture, dtype=float) for picture in pictures])
