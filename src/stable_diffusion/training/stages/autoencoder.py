"""The autoencoder's stage: pictures through the latents and back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from stable_diffusion.data.cache import Array
from stable_diffusion.nn.vae import AutoencoderKL, AutoencoderTiny
from stable_diffusion.training.compute import is_shared, summed
from stable_diffusion.training.draw import Draw
from stable_diffusion.training.pictures import LATENT_NOISE, PictureStage, distance
from stable_diffusion.training.stage import Batch, StageSettings
from stable_diffusion.training.workspace import TrainableParts, read_pixels

POOLED_WEIGHT = 0.25  # pooled latents decode to the pooled picture: latents that diffuse well (EQ-VAE, 2025)
KL_WEIGHT = 1e-6  # Rombach et al. 2022, section 3.1: just enough to keep latents together


@dataclass(frozen=True, kw_only=True)
class AutoencoderSettings(StageSettings):
    """Settings of the stage ``autoencoder``."""

    kind: str = "autoencoder"
    batch_size: int = 32
    epochs: float = 6.0
    min_steps: int = 200
    ema_decay: float = 0.995


class AutoencoderStage(PictureStage):
    """Absolute error of pixels, of their differences, and of half-size pictures from half-size latents."""

    share = 0.15

    def __init__(self, parts: TrainableParts, settings: AutoencoderSettings) -> None:
        super().__init__(parts, settings)
        self.vae = parts.vae

    def batch(self, draw: Draw) -> Batch:
        """Pictures, and the noise of their latents."""
        pixels = read_pixels(self.pictures, draw.indices(self.samples), self.device)
        return self.placed(
            pixels, self.noise(draw, LATENT_NOISE if isinstance(self.vae, AutoencoderTiny) else None)
        )

    def forward(self, pixels: Float[Tensor, "b 3 h w"], noise: Float[Tensor, "b c y x"]) -> dict[str, Tensor]:
        latents, penalties = self._latents(pixels, noise)
        error = self.vae.decode(latents) - pixels
        pooled = self.vae.decode(F.avg_pool2d(latents, 2)) - F.avg_pool2d(pixels, 2)
        return {**distance(error), "pooled": POOLED_WEIGHT * pooled.abs().mean(), **penalties}

    def _latents(self, pixels: Tensor, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Latents as the decoder will meet them, and what the regulariser asks for them."""
        if isinstance(self.vae, AutoencoderTiny):
            # Unit standard deviation from the first step on, as `normalise` will make it for good.
            return unit(self.vae.encode(pixels).float()) + noise, {}
        scale = self.vae.config.scaling_factor
        posterior = self.vae.posterior(pixels)
        if self.vae.quantize is not None:
            _, _, loss = self.vae.quantize(posterior.mean)
            return posterior.mean * scale, {"codebook": loss}
        return posterior.sample(noise) * scale, {"kl": KL_WEIGHT * posterior.kl().mean()}

    def finish(self, done: bool) -> None:
        """Gives the latents unit standard deviation for good."""
        if done:
            normalise(self.vae, self.pictures)


def unit(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """With mean 0 and standard deviation 1 in each channel, over the batch of all processes."""
    if not is_shared():
        std, mean = torch.std_mean(x, dim=(0, 2, 3), keepdim=True)
    else:
        count = summed(torch.tensor(float(x[:, 0].numel()), dtype=x.dtype, device=x.device))
        mean = summed(x.sum(dim=(0, 2, 3), keepdim=True)) / count
        std = (summed(((x - mean) ** 2).sum(dim=(0, 2, 3), keepdim=True)) / (count - 1)).sqrt()
    return (x - mean) / (std + 1e-5)


@torch.no_grad()
def normalise(
    vae: AutoencoderKL | AutoencoderTiny, pictures: Array, count: int = 2048, chunk: int = 32
) -> None:
    """Measures the latents of up to `count` pictures and gives them mean 0 and standard deviation 1 for good."""
    indices = list(range(0, len(pictures), max(1, len(pictures) // count)))
    chunks = [indices[i : i + chunk] for i in range(0, len(indices), chunk)]
    latents = torch.cat([vae.encode(read_pixels(pictures, some, vae.device)).cpu() for some in chunks])
    std, mean = torch.std_mean(latents.double(), dim=(0, 2, 3), correction=0)
    vae.normalise(mean.float().to(vae.device), std.clamp(min=1e-5).float().to(vae.device))
