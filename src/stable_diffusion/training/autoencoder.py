"""The autoencoder's stage: pictures through the latents and back."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from stable_diffusion.config import StageConfig
from stable_diffusion.data.cache import Array
from stable_diffusion.nn.vae import AutoencoderKL, AutoencoderTiny
from stable_diffusion.training.loop import Draw

GRADIENT_WEIGHT = 0.5  # edges: without it thin lines soften
POOLED_WEIGHT = 0.25  # pooled latents decode to the pooled picture: latents that diffuse well (EQ-VAE, 2025)
KL_WEIGHT = 1e-6  # Rombach et al. 2022, section 3.1: just enough to keep latents together
LATENT_NOISE = 0.25  # what the light autoencoder's decoder must bear, in the latents' deviations


class AutoencoderStage(nn.Module):
    """Absolute error of pixels, of their differences, and of half-size pictures from half-size latents."""

    name = "autoencoder"

    def __init__(self, vae: AutoencoderKL | AutoencoderTiny, settings: StageConfig, image_size: int) -> None:
        super().__init__()
        self.vae = vae
        self.settings = settings
        self.image_size = image_size
        self.pictures: Array | None = None  # b h w 3, uint8

    def batch(self, draw: Draw) -> tuple[Tensor, ...]:
        """Pictures in [-1, 1], and the noise of their latents."""
        assert self.pictures is not None, "set `pictures` first"
        pixels = read_pixels(self.pictures, draw.indices(len(self.pictures)))
        side = self.image_size // self.vae.config.factor
        shape = (self.vae.config.latent_channels, side, side)
        noise = torch.stack([torch.randn(shape, generator=generator) for generator in draw.generators()])
        return self._place(pixels), self._place(noise)

    def example(self) -> tuple[Tensor, ...]:
        size, side = self.image_size, self.image_size // self.vae.config.factor
        return (
            self._place(torch.rand(self.settings.batch_size, 3, size, size)),
            self._place(torch.randn(self.settings.batch_size, self.vae.config.latent_channels, side, side)),
        )

    def _place(self, x: Tensor) -> Tensor:
        return x.to(next(self.parameters()).device, memory_format=torch.channels_last)

    def forward(self, pixels: Float[Tensor, "b 3 h w"], noise: Float[Tensor, "b c y x"]) -> Float[Tensor, ""]:
        latents, penalty = self._latents(pixels, noise)
        error = self.vae.decode(latents) - pixels
        pooled = self.vae.decode(F.avg_pool2d(latents, 2)) - F.avg_pool2d(pixels, 2)
        loss = error.abs().mean() + POOLED_WEIGHT * pooled.abs().mean() + penalty
        for axis in (2, 3):
            loss = loss + GRADIENT_WEIGHT * error.diff(dim=axis).abs().mean()
        return loss

    def _latents(self, pixels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor | float]:
        """Latents as the decoder will meet them, and what the regulariser asks for them."""
        if isinstance(self.vae, AutoencoderTiny):
            raw = self.vae.encode(pixels).float()
            # Unit deviation from the first step on, as `normalise` will make it for good.
            std, mean = torch.std_mean(raw, dim=(0, 2, 3), keepdim=True)
            return (raw - mean) / (std + 1e-5) + LATENT_NOISE * noise, 0.0
        scale = self.vae.config.scaling_factor
        posterior = self.vae.posterior(pixels)
        if self.vae.quantize is not None:
            _, _, loss = self.vae.quantize(posterior.mean)
            return posterior.mean * scale, loss
        return posterior.sample(noise) * scale, KL_WEIGHT * posterior.kl().mean()


@torch.no_grad()
def normalise(
    vae: AutoencoderKL | AutoencoderTiny, pictures: Array, count: int = 2048, chunk: int = 32
) -> None:
    """Measures the latents of up to `count` pictures and gives them mean 0 and deviation 1 for good."""
    device = next(vae.parameters()).device
    step = max(1, len(pictures) // count)
    indices = list(range(0, len(pictures), step))
    sums = torch.zeros(2, vae.config.latent_channels, dtype=torch.float64)
    values = 0
    for i in range(0, len(indices), chunk):
        latents = vae.encode(read_pixels(pictures, indices[i : i + chunk]).to(device)).cpu().double()
        sums += torch.stack([latents.sum(dim=(0, 2, 3)), (latents**2).sum(dim=(0, 2, 3))])
        values += latents[:, 0].numel()
    mean = sums[0] / values
    std = (sums[1] / values - mean**2).clamp(min=1e-10).sqrt()
    vae.normalise(mean.float().to(device), std.float().to(device))


def read_pixels(pictures: Array, indices: list[int]) -> Float[Tensor, "b 3 h w"]:
    """Rows of the picture cache as floats in [-1, 1]."""
    return torch.from_numpy(pictures[indices]).permute(0, 3, 1, 2).float() / 127.5 - 1
