"""The guided denoiser over a network, and the sockets that networks plug into."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from stable_diffusion.config import Guidance
from stable_diffusion.diffusion.guidance import guide, is_on
from stable_diffusion.diffusion.objective import Denoiser, to_x0
from stable_diffusion.diffusion.schedule import Level, Schedule
from stable_diffusion.nn.blocks import KeysValues, guidance_features
from stable_diffusion.nn.text import PromptEmbeds
from stable_diffusion.nn.unet import UNet

Latents = Float[Tensor, "b c h w"]


class Network(Protocol):
    """What predicts the noise: the U-Net, or anything that stands for one."""

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def reads_guidance(self) -> bool:
        """Whether it was distilled from guided predictions: it reads the scale, and is not guided."""
        ...

    def prepare(
        self, prompt_embeds: PromptEmbeds, timesteps: Collection[float], guidance_scale: float
    ) -> Any:
        """What does not change from step to step, for a batch of prompts and the timesteps that will be asked for."""
        ...

    def __call__(self, sample: Latents, timestep: float, prepared: Any) -> Latents:
        """The prediction for noisy latents at one of the timesteps, given what ``prepare`` made for their prompts."""
        ...


class Codec(Protocol):
    """What turns pixels in [-1, 1] into latents of unit standard deviation, and back: the autoencoder."""

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def encode(self, images: Float[Tensor, "b 3 height width"]) -> Latents: ...
    def decode(self, latents: Latents) -> Float[Tensor, "b 3 height width"]: ...


class Prepared(NamedTuple):
    """What the U-Net computes once for a walk."""

    times: dict[float, Float[Tensor, "b t"]]
    keys_values: list[KeysValues | None]
    mask: Bool[Tensor, "b n"] | None


class UNetNetwork:
    """The U-Net as a ``Network``."""

    def __init__(self, unet: UNet) -> None:
        self.unet = unet

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype

    @property
    def reads_guidance(self) -> bool:
        return self.unet.config.time_cond_proj_dim is not None

    def prepare(
        self, prompt_embeds: PromptEmbeds, timesteps: Collection[float], guidance_scale: float
    ) -> Prepared:
        tokens, mask, pooled = prompt_embeds
        labels = pooled if self.unet.config.pooled_projection_dim is not None else None
        count = len(pooled)
        condition = None
        if (width := self.unet.config.time_cond_proj_dim) is not None:
            condition = guidance_features(torch.full((count,), guidance_scale, device=self.device), width)

        def time(t: float) -> Float[Tensor, "b t"]:
            timesteps = torch.full((count,), t, dtype=torch.float32, device=self.device)
            return self.unet.embed_time(timesteps, labels, condition)

        return Prepared({t: time(t) for t in timesteps}, self.unet.keys_values(tokens), mask)

    def __call__(self, sample: Latents, timestep: float, prepared: Prepared) -> Latents:
        return self.unet.predict(sample, prepared.times[timestep], prepared.keys_values, prepared.mask)


@dataclass(frozen=True)
class Known:
    """What the picture to change says of the latents."""

    x0: Latents
    mask: Latents | None
    """1 where inpainting repaints, one channel."""
    masked: Latents | None
    """Latents of the picture with grey where it is repainted, for a U-Net that reads them."""
    noise: Latents
    """The noise that the walk began with."""

    @property
    def kept(self) -> Bool[Tensor, "1 1 h w"] | None:
        """Where the walk is held to the picture; None without a mask, or where the U-Net reads it itself."""
        return None if self.mask is None or self.masked is not None else self.mask <= 0.5


def denoiser(
    network: Network,
    schedule: Schedule,
    embeds: tuple[PromptEmbeds, PromptEmbeds],
    guidance: Guidance,
    known: Known | None,
    levels: Sequence[Level],
) -> Denoiser:
    """The network as a sampler sees it: guided, and for inpainting reminded of what is not repainted.

    Args:
        network: what predicts.
        schedule: the model's.
        embeds: of the prompts, and of the negative prompts.
        guidance: classifier-free guidance; a network that reads the scale is not guided.
        known: the picture to change, if there is one.
        levels: those that will be asked for.
    """
    conditional, unconditional = embeds
    noisy = [level for level in levels if level.sigma > 0]
    guided = {level.t for level in noisy if not network.reads_guidance and is_on(guidance, level, schedule)}
    plain = {level.t for level in noisy} - guided
    for_both = network.prepare(unconditional + conditional, guided, guidance.scale) if guided else None
    for_one = network.prepare(conditional, plain, guidance.scale) if plain else None
    prediction_type = schedule.config.prediction_type

    kept = None if known is None else known.kept
    extra = None
    if known is not None and known.mask is not None and known.masked is not None:
        extra = torch.cat([known.mask, known.masked], dim=1)

    def predict(x: Latents, level: Level, prepared: Any) -> Latents:
        if extra is not None:
            x = torch.cat([x, extra.expand(len(x), -1, -1, -1)], dim=1)
        return network(x, level.t, prepared)

    def denoise(x: Latents, level: Level) -> Latents:
        if kept is not None and known is not None and level != levels[0]:
            # The kept part as the walk would have it: the picture with its own noise of this level.
            x = torch.where(kept, level.alpha * known.x0 + level.sigma * known.noise, x)
        if level.t in guided:
            uncond, cond = predict(torch.cat([x, x]), level, for_both).chunk(2)
            output = guide(cond, uncond, guidance)
        else:
            output = predict(x, level, for_one)
        x0 = to_x0(prediction_type, output, x, level.alpha, level.sigma)
        return x0 if kept is None or known is None else torch.where(kept, known.x0, x0)

    return denoise
