"""What the stages on pictures share: pictures as batches, noise of their latents, and the distance of two pictures."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from stable_diffusion.data.cache import Array
from stable_diffusion.training.draw import FLOAT32, Draw, Samples
from stable_diffusion.training.events import TrainStep
from stable_diffusion.training.stage import Batch, Stage, StageSettings
from stable_diffusion.training.workspace import TrainableParts, Workspace, latent_shape

GRADIENT_WEIGHT = 0.5  # edges: without it thin lines soften
LATENT_NOISE = 0.25  # most that a decoder must bear, in the latents' standard deviations


class PictureStage(Stage):
    """A stage whose batches are pictures in [-1, 1], and something of their latents' shape.

    Pictures have three channels, or, where the autoencoder decodes opacity, four.
    """

    pictures: Array  # b h w c, uint8

    def __init__(self, parts: TrainableParts, settings: StageSettings) -> None:
        super().__init__(settings)
        self.size, self.latent_shape = parts.config.sample_size, latent_shape(parts.config)
        self.channels = 3 + parts.config.alpha

    def prepare(self, workspace: Workspace) -> Iterator[TrainStep]:
        """Decodes the pictures."""
        self.pictures = yield from workspace.pictures()
        self.samples = Samples(len(self.pictures))

    def example(self, count: int) -> Batch:
        """Random pictures and latents."""
        pixels = torch.rand(count, self.channels, self.size, self.size, **FLOAT32)
        return self.placed(pixels, torch.randn(count, *self.latent_shape, **FLOAT32))

    def noise(self, draw: Draw, most: float | None) -> Tensor:
        """Normal noise for each picture's latents: of standard deviation 1, or of one between 0 and `most`."""
        generator = draw.generator()
        noise = torch.randn(draw.batch_size, *self.latent_shape, generator=generator, **FLOAT32)
        if most is not None:
            noise *= most * torch.rand(draw.batch_size, 1, 1, 1, generator=generator, **FLOAT32)
        return draw.share(noise)


def on_grounds(
    images: Float[Tensor, "b 4 h w"], grounds: Float[Tensor, "b 3 1 1"]
) -> Float[Tensor, "b 3 h w"]:
    """Pictures on white with their opacity, laid on grounds of other colours; all in [-1, 1].

    What shows through is white, so far: of it, each ground takes away what it is darker (Porter & Duff 1984, "over").
    """
    return images[:, :3] - (1 - images[:, 3:]) * (1 - grounds) / 2


def distance(error: Tensor) -> dict[str, Tensor]:
    """Absolute error of pixels and, weighted, of their differences along both sides."""
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return {"pixels": error.abs().mean(), "edges": GRADIENT_WEIGHT * edges}
