"""The decoder's stage: the decoder alone, made sharp by a discriminator."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from stable_diffusion.data.cache import Array
from stable_diffusion.fields import within
from stable_diffusion.training.draw import FLOAT32, Draw
from stable_diffusion.training.events import TrainStep
from stable_diffusion.training.pictures import LATENT_NOISE, PictureStage, distance, on_grounds
from stable_diffusion.training.stage import Batch, OptimizerSettings, Player, StageSettings
from stable_diffusion.training.workspace import TrainableParts, Workspace, read_pixels

OPACITY_WEIGHT = 0.5  # of opacity's error, and of that on a ground, beside the error on white
DETAIL_GAIN = 4.0  # of fine detail before the discriminator, beside pixels in [-1, 1]


@dataclass(frozen=True, kw_only=True)
class DecoderSettings(StageSettings):
    """Settings of the stage ``decoder``."""

    kind: str = "decoder"
    adversarial_weight: Annotated[float, within(0, 100)] = 0.15
    """Of fooling the discriminator, beside the absolute error; 0 trains without one."""
    discriminator: OptimizerSettings = field(default_factory=OptimizerSettings)
    """How the other player is updated; it has no average."""


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
            layers.append(nn.Conv2d(c_in, c_out, 4, stride=2, padding=1, **FLOAT32))
            if c_out > width:  # the first layer's contrasts are what tells
                layers.append(nn.GroupNorm(8, c_out, **FLOAT32))
            layers.append(nn.LeakyReLU(0.2))
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 3, padding=1, **FLOAT32))

    def forward(self, images: Float[Tensor, "b rgb height width"]) -> Float[Tensor, "b 1 y x"]:
        details = images - F.avg_pool2d(images, 3, stride=1, padding=1)
        return self.layers(torch.cat([images, DETAIL_GAIN * details], dim=1))


class DecoderStage(PictureStage):
    """The decoder alone against a discriminator, on latents that stay as they are (Esser et al. 2021, section 3.1).

    Absolute error leaves soft what the latents leave open; what decides between styles is sharp.
    """

    share = 0.1
    latents: Array  # b c h w, float16

    def __init__(self, parts: TrainableParts, settings: DecoderSettings) -> None:
        super().__init__(parts, settings)
        self.judge_settings = settings.discriminator
        self.vae = (parts.vae,)  # in a tuple, since only what decodes is trained
        self.decoder = parts.vae.decoder
        self.post_quant_conv = getattr(parts.vae, "post_quant_conv", None)
        self.adversarial_weight = settings.adversarial_weight
        with torch.random.fork_rng(devices=[]):  # the same start, whatever was sampled before
            torch.manual_seed(0)
            self.discriminator = Discriminator(parts.vae.config.in_channels)
        self.discriminator.to(parts.vae.device).requires_grad_(self.adversarial_weight > 0)

    def prepare(self, workspace: Workspace) -> Iterator[TrainStep]:
        """Decodes the pictures and encodes their latents."""
        yield from super().prepare(workspace)
        self.latents = yield from workspace.latents()

    def players(self) -> dict[str, Player]:
        """The decoder, and the discriminator that it is to fool, if it is."""
        ((kind, both),) = super().players().items()
        judge = {name: p for name, p in both.parameters.items() if name.startswith("discriminator.")}
        decoder = {name: p for name, p in both.parameters.items() if name not in judge}
        players = {kind: both._replace(parameters=decoder)}
        if judge:
            players["discriminator"] = Player(self.judge_settings, judge, ema_decay=None)
        return players

    def batch(self, draw: Draw) -> Batch:
        """Pictures, their latents with noise of any standard deviation up to `LATENT_NOISE`, and grounds."""
        indices = draw.indices(self.samples)
        latents = torch.from_numpy(self.latents[indices]).to(self.device).float()
        noise = self.noise(draw, LATENT_NOISE).to(self.device)
        pixels = read_pixels(self.pictures, indices, self.device)
        return self.placed(pixels, latents + noise, *map(draw.share, self._grounds(draw.batch_size, draw)))

    def example(self, count: int) -> Batch:
        """Random pictures, latents and grounds."""
        return super().example(count) + self.placed(*self._grounds(count))

    def _grounds(self, count: int, draw: Draw | None = None) -> tuple[Tensor, ...]:
        """Colours to lay pictures on that have opacity, half of them white; nothing for opaque pictures."""
        if self.channels == 3:
            return ()
        generator = None if draw is None else draw.generator()
        colours = torch.rand(count, 4, 1, 1, generator=generator, **FLOAT32)
        return ((2 * colours[:, :3] - 1).where(colours[:, 3:] < 0.5, 1.0),)

    def forward(
        self,
        pixels: Float[Tensor, "b rgba h w"],
        latents: Float[Tensor, "b c y x"],
        grounds: Float[Tensor, "b 3 1 1"] | None = None,
    ) -> dict[str, Tensor]:
        decoded = self.vae[0].decode(latents)
        terms = distance((decoded - pixels)[:, :3])
        if grounds is not None:
            opacity = distance((decoded - pixels)[:, 3:])
            decoded, pixels = on_grounds(decoded, grounds), on_grounds(pixels, grounds)
            ground = distance(decoded - pixels)
            terms["alpha"] = OPACITY_WEIGHT * (opacity["pixels"] + opacity["edges"])
            terms["ground"] = OPACITY_WEIGHT * (ground["pixels"] + ground["edges"])
        if not self.adversarial_weight:
            return terms
        # Two players, one backward pass: each sees the other as it is.
        frozen = {name: value.detach() for name, value in self.discriminator.named_parameters()}
        fooled = -torch.func.functional_call(self.discriminator, frozen, (decoded,)).mean()
        real, fake = self.discriminator(torch.cat([pixels, decoded.detach()])).chunk(2)
        hinge = F.relu(1 - real).mean() + F.relu(1 + fake).mean()
        return {**terms, "fooling": self.adversarial_weight * fooled, "discriminator": hinge}
