"""The overfit check: whether a set-up can learn eight pictures by heart, before hours go into all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from stable_diffusion import images
from stable_diffusion.config import ModelConfig, StageConfig
from stable_diffusion.data.item import CaptionedImages, Entry, Item
from stable_diffusion.errors import InputError
from stable_diffusion.generation import pipeline
from stable_diffusion.generation.request import Request
from stable_diffusion.training.loop import TrainStep
from stable_diffusion.training.run import Plan, TrainableParts, train_model

PICTURES = 8
AUTOENCODER_STEPS, DENOISER_STEPS, BATCH = 400, 800, 16
ENOUGH = 7  # prompts of the eight that must draw their own picture


@dataclass(frozen=True)
class Verdict:
    """The outcome of a check."""

    right: int
    """Prompts whose picture is nearer to their own training picture than to any other."""
    pictures: int
    error: float
    """Root mean square distance of the drawn pictures to the right ones, in pixel values of 255."""

    @property
    def learns(self) -> bool:
        return self.right >= min(ENOUGH, self.pictures)

    def __str__(self) -> str:
        failed = "the set-up does NOT learn: look at the pictures, the captions and the stages' losses first"
        outcome = "the set-up learns" if self.learns else failed
        right = f"{self.right} of {self.pictures} prompts draw their own picture"
        return f"{right} (error {self.error:.0f} of 255): {outcome}"


class _Few:
    """Some pictures of a set, each with one caption that no other has."""

    def __init__(self, data: CaptionedImages, count: int) -> None:
        self.data = data
        self.chosen: dict[int, str] = {}
        for index in range(len(data)):
            new = [caption for caption in data.captions(index) if caption not in self.chosen.values()]
            if new:
                self.chosen[index] = max(new, key=len)
            if len(self.chosen) == count:
                break
        self.order = list(self.chosen)

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> Item:
        entry = self.data.entries()[self.order[index]]
        image = self.data.image(entry.key)
        return Item(key=entry.key, captions=self.captions(index), version=entry.version, image=image)

    def entries(self) -> list[Entry]:
        return [replace(self.data.entries()[i], captions=(self.chosen[i],), weight=1.0) for i in self.order]

    def image(self, key: str) -> Image.Image:
        return self.data.image(key)

    def captions(self, index: int) -> tuple[str, ...]:
        return (self.chosen[self.order[index]],)

    def weight(self, index: int) -> float:
        return 1.0

    def name(self, index: int) -> str:
        return self.data.name(self.order[index])

    def path(self, index: int) -> Path:
        return self.data.path(self.order[index])


def check_config(config: ModelConfig) -> ModelConfig:
    """The configuration with a recipe that is long enough for eight pictures, which need not be sharp."""

    def stage(settings: StageConfig, steps: int) -> StageConfig:
        return dataclasses.replace(settings, batch_size=BATCH, min_steps=steps, passes=1.0)

    training = dataclasses.replace(
        config.training,
        autoencoder=stage(config.training.autoencoder, AUTOENCODER_STEPS),
        denoiser=stage(config.training.denoiser, DENOISER_STEPS),
        decoder=None,
    )
    return dataclasses.replace(config, training=training)


def overfit(
    parts: TrainableParts, data: CaptionedImages, output_dir: Path, *, autocast: bool
) -> Generator[Plan | TrainStep | Verdict, None, None]:
    """Trains `parts`, made from ``check_config``, on eight pictures, and draws them from their captions.

    Raises:
        InputError: fewer than two pictures with captions of their own.
    """
    few = _Few(data, PICTURES)
    if len(few) < 2:
        raise InputError(f"the check needs at least 2 pictures with captions of their own, got {len(few)}")
    yield from train_model(parts, few, output_dir=output_dir, resume=False, autocast=autocast)
    size = parts.config.sample_size
    prompts = tuple(few.captions(i)[0] for i in range(len(few)))
    request = Request.of(parts.config, prompt=prompts, seed=0, guidance_scale=1.0)
    pictures = pipeline.finished(pipeline.stream(parts, request)).pictures
    drawn = np.stack([np.asarray(picture, dtype=float) for picture in pictures])
    wanted = np.stack(
        [np.asarray(images.cover(few[i].image, size, size), dtype=float) for i in range(len(few))]
    )
    distances = ((drawn[:, None] - wanted[None]) ** 2).mean(axis=(2, 3, 4)) ** 0.5
    right = int((distances.argmin(axis=1) == np.arange(len(few))).sum())
    yield Verdict(right, len(few), float(distances.diagonal().mean()))
