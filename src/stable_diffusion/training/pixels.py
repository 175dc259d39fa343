"""What stages share: pictures and latents as tensors, noise, and the distance of pictures."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from stable_diffusion.config import ModelConfig
from stable_diffusion.data.cache import Array
from stable_diffusion.training.draw import Draw

GRADIENT_WEIGHT = 0.5  # edges: without it thin lines soften
LATENT_NOISE = 0.25  # most that a decoder must bear, in the latents' standard deviations


def read_pixels(
    pictures: Array, indices: list[int], device: torch.device | str = "cpu"
) -> Float[Tensor, "b 3 h w"]:
    """Rows of the picture cache as floats in [-1, 1]."""
    return torch.from_numpy(pictures[indices]).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def sample_noise(draw: Draw, shape: tuple[int, ...], most: float | None) -> Tensor:
    """Normal noise for each picture: of unit standard deviation, or of one between 0 and `most`, anew for each."""
    generator = draw.generator()
    noise = torch.randn(draw.batch_size, *shape, generator=generator)
    if most is not None:
        noise *= most * torch.rand(draw.batch_size, 1, 1, 1, generator=generator)
    return draw.share(noise)


def distance(error: Tensor) -> dict[str, Tensor]:
    """Absolute error of pixels and, weighted, of their differences along both sides."""
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return {"pixels": error.abs().mean(), "edges": GRADIENT_WEIGHT * edges}


def shapes(config: ModelConfig) -> tuple[int, tuple[int, int, int]]:
    """The side of the pictures that a model is trained on, and the shape of their latents."""
    side = config.sample_size // config.vae.factor
    return config.sample_size, (config.vae.latent_channels, side, side)


def placed(device: torch.device, *tensors: Tensor) -> tuple[Tensor, ...]:
    """On the device, in the memory format that convolutions like."""
    return tuple(x.to(device, memory_format=torch.channels_last) for x in tensors)
