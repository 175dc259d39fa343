"""The autoencoder's stages: pictures through the latents and back; then the decoder alone, made sharp."""

from __future__ import annotations

import itertools

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
ADVERSARIAL_WEIGHT = 0.15  # of fooling the discriminator, beside the absolute error
DETAIL_GAIN = 4.0  # of fine detail before the discriminator, beside pixels in [-1, 1]
LATENT_NOISE = 0.25  # most that the light autoencoder's decoder must bear, in the latents' deviations


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
        indices = draw.indices(len(self.pictures))
        pixels = read_pixels(self.pictures, indices, next(self.parameters()).device)
        side = self.image_size // self.vae.config.factor
        shape = (self.vae.config.latent_channels, side, side)
        most = LATENT_NOISE if isinstance(self.vae, AutoencoderTiny) else None
        return self._place(pixels), self._place(_noise(draw, shape, most))

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
        return _distance(error) + POOLED_WEIGHT * pooled.abs().mean() + penalty

    def _latents(self, pixels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor | float]:
        """Latents as the decoder will meet them, and what the regulariser asks for them."""
        if isinstance(self.vae, AutoencoderTiny):
            raw = self.vae.encode(pixels).float()
            # Unit deviation from the first step on, as `normalise` will make it for good.
            std, mean = torch.std_mean(raw, dim=(0, 2, 3), keepdim=True)
            return (raw - mean) / (std + 1e-5) + noise, 0.0
        scale = self.vae.config.scaling_factor
        posterior = self.vae.posterior(pixels)
        if self.vae.quantize is not None:
            _, _, loss = self.vae.quantize(posterior.mean)
            return posterior.mean * scale, loss
        return posterior.sample(noise) * scale, KL_WEIGHT * posterior.kl().mean()


class Discriminator(nn.Module):
    """Says of overlapping patches whether they look real (Isola et al. 2017, section 3.2.2), above 0 for yes.

    Beside the pixels it sees how they differ from their neighbourhood's mean, where decoded pictures give themselves
    away: their contents are the real ones already.
    """

    def __init__(self, in_channels: int = 3, width: int = 32) -> None:
        super().__init__()
        widths = [2 * in_channels, width, 2 * width, 4 * width]
        layers: list[nn.Module] = []
        for c_in, c_out in itertools.pairwise(widths):
            layers.append(nn.Conv2d(c_in, c_out, 4, stride=2, padding=1))
            if c_out > width:  # the first layer's contrasts are what tells
                layers.append(nn.GroupNorm(8, c_out))
            layers.append(nn.LeakyReLU(0.2))
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 3, padding=1))

    def forward(self, images: Float[Tensor, "b rgb height width"]) -> Float[Tensor, "b 1 y x"]:
        details = images - F.avg_pool2d(images, 3, stride=1, padding=1)
        return self.layers(torch.cat([images, DETAIL_GAIN * details], dim=1))


class DecoderStage(nn.Module):
    """The decoder alone against a discriminator, on latents that stay as they are (Esser et al. 2021, section 3.1).

    Absolute error leaves soft what the latents leave open; what decides between styles is sharp.
    """

    name = "decoder"

    def __init__(self, vae: AutoencoderKL | AutoencoderTiny, settings: StageConfig, image_size: int) -> None:
        super().__init__()
        self.vae = (vae,)  # in a tuple, since only what decodes is trained
        self.decoder = vae.decoder
        self.post_quant_conv = getattr(vae, "post_quant_conv", None)
        with torch.random.fork_rng(devices=[]):  # the same start, whatever was drawn before
            torch.manual_seed(0)
            discriminator = Discriminator(vae.config.in_channels)
        self.discriminator = discriminator.to(next(vae.parameters()).device)
        self.settings = settings
        self.image_size = image_size
        self.pictures: Array | None = None  # b h w 3, uint8
        self.latents: Array | None = None  # b c h w, float16

    def batch(self, draw: Draw) -> tuple[Tensor, ...]:
        """Pictures in [-1, 1], and their latents with noise of any deviation up to `LATENT_NOISE`."""
        assert self.pictures is not None and self.latents is not None, "set `pictures` and `latents` first"
        indices = draw.indices(len(self.pictures))
        device = next(self.parameters()).device
        latents = torch.from_numpy(self.latents[indices]).to(device).float()
        noise = _noise(draw, latents.shape[1:], LATENT_NOISE)
        pixels = read_pixels(self.pictures, indices, device)
        return self._place(pixels), self._place(latents + noise.to(device))

    def example(self) -> tuple[Tensor, ...]:
        vae, size, count = self.vae[0].config, self.image_size, self.settings.batch_size
        side = size // vae.factor
        return (
            self._place(torch.rand(count, vae.in_channels, size, size)),
            self._place(torch.randn(count, vae.latent_channels, side, side)),
        )

    def _place(self, x: Tensor) -> Tensor:
        return x.to(next(self.parameters()).device, memory_format=torch.channels_last)

    def forward(
        self, pixels: Float[Tensor, "b 3 h w"], latents: Float[Tensor, "b c y x"]
    ) -> Float[Tensor, ""]:
        decoded = self.vae[0].decode(latents)
        # Two players, one backward pass: each sees the other as it is.
        frozen = {name: value.detach() for name, value in self.discriminator.named_parameters()}
        fooled = -torch.func.functional_call(self.discriminator, frozen, (decoded,)).mean()
        real, fake = self.discriminator(torch.cat([pixels, decoded.detach()])).chunk(2)
        hinge = F.relu(1 - real).mean() + F.relu(1 + fake).mean()
        return _distance(decoded - pixels) + ADVERSARIAL_WEIGHT * fooled + hinge


def _noise(draw: Draw, shape: tuple[int, ...], most: float | None) -> Tensor:
    """Normal noise for each picture: of unit deviation, or of one between 0 and `most`, anew for each."""
    generator = draw.generator()
    noise = torch.randn(draw.batch_size, *shape, generator=generator)
    if most is not None:
        noise *= most * torch.rand(draw.batch_size, 1, 1, 1, generator=generator)
    return draw.share(noise)


def _distance(error: Tensor) -> Tensor:
    """Absolute error of pixels and of their differences along both sides."""
    edges = sum(error.diff(dim=axis).abs().mean() for axis in (2, 3))
    return error.abs().mean() + GRADIENT_WEIGHT * edges


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
        latents = vae.encode(read_pixels(pictures, indices[i : i + chunk], device)).cpu().double()
        sums += torch.stack([latents.sum(dim=(0, 2, 3)), (latents**2).sum(dim=(0, 2, 3))])
        values += latents[:, 0].numel()
    mean = sums[0] / values
    std = (sums[1] / values - mean**2).clamp(min=1e-10).sqrt()
    vae.normalise(mean.float().to(device), std.float().to(device))


def read_pixels(
    pictures: Array, indices: list[int], device: torch.device | str = "cpu"
) -> Float[Tensor, "b 3 h w"]:
    """Rows of the picture cache as floats in [-1, 1]."""
    return torch.from_numpy(pictures[indices]).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
