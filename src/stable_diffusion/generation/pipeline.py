"""Generation over the parts of a model: encode the text, draw noise, plan levels, begin, sample, decode."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from stable_diffusion import images
from stable_diffusion.config import Guidance, SamplerConfig, Styles
from stable_diffusion.diffusion.guidance import guide, is_on
from stable_diffusion.diffusion.objective import Denoiser, to_x0
from stable_diffusion.diffusion.samplers import Step, initial_scale, sample, sampling_levels
from stable_diffusion.diffusion.schedule import Level, Schedule
from stable_diffusion.errors import InputError
from stable_diffusion.nn.text import PromptEmbeds, PromptEncoder
from stable_diffusion.nn.unet import UNet
from stable_diffusion.nn.vae import AutoencoderKL, AutoencoderTiny

Latents = Float[Tensor, "b c h w"]


class Parts(Protocol):
    """What generation needs of a model."""

    vae: AutoencoderKL | AutoencoderTiny
    unet: UNet
    text_encoder: PromptEncoder
    scheduler: Schedule


@dataclass(frozen=True, kw_only=True)
class Request:
    """A batch of pictures to make: everything is set, nothing is a default."""

    prompts: tuple[str, ...]
    """One a picture."""
    negative_prompts: tuple[str, ...]
    """One a picture; the empty one is the unconditional embedding that training saw."""
    seeds: tuple[int, ...]
    """One a picture: all its draws come from this seed's generator."""
    height: int
    width: int
    num_inference_steps: int
    guidance: Guidance
    sampler: SamplerConfig
    styles: Styles = field(default_factory=Styles)
    """By which the prompts, not the negative ones, get the default style as they are encoded."""
    strength: float = 1.0
    """Part of the walk that image-to-image takes; 1 begins at pure noise."""
    image: Image.Image | None = None
    """Where image-to-image and inpainting begin; of the size above."""
    mask: Image.Image | None = None
    """White where inpainting repaints; of the size above."""
    latents: Latents | None = None
    """Standard normal latents to begin with instead of the seeds' own."""


class NonFinite(InputError):
    """A part of the model gave NaN or infinity."""


def _check_finite(part: str, x: Tensor, when: str = "") -> None:
    if not torch.isfinite(x).all():
        raise NonFinite(
            f"{part} gave NaN or infinity{when}: its weights are damaged, or its number format too narrow;"
            " no picture was made"
        )


@torch.no_grad()
def generate(parts: Parts, request: Request) -> Iterator[Step]:
    """The steps from noise to clean latents. The last one's ``x`` is what ``decode`` takes."""
    embeds = encode_prompts(parts, request)
    noise = seeded_noise(parts, request)
    levels = plan(parts, request)
    drawn = noise()
    start = drawn if request.latents is None else request.latents.to(drawn)
    known = encode_image(parts, request, start)
    x = begin(parts, request, levels, start, known)
    denoise = denoiser(parts, embeds, request.guidance, known, levels[0])
    for step in sample(request.sampler, denoise, x, levels, noise=noise):
        _check_finite("the U-Net", step.x, f" at step {step.index + 1} of {step.total}")
        if step.index + 1 == step.total and known is not None and known.kept is not None:
            # The walk may end on a trace of noise.
            step = replace(step, x=torch.where(known.kept, known.x0, step.x))
        yield step


@torch.no_grad()
def decode(parts: Parts, request: Request, latents: Latents) -> list[Image.Image]:
    """The pictures; where a mask is black, the bytes of the image it belongs to."""
    # One by one: memory, and the same bytes.
    pixels = torch.cat([parts.vae.decode(one[None]) for one in latents])
    _check_finite("the autoencoder's decoder", pixels)
    pictures = images.to_pil(pixels.float())
    if request.mask is not None and request.image is not None:
        repaint = request.mask.convert("L").point(lambda value: 255 if value > 127 else 0)
        pictures = [Image.composite(picture, request.image, repaint) for picture in pictures]
    return pictures


def encode_prompts(parts: Parts, request: Request) -> tuple[PromptEmbeds, PromptEmbeds]:
    """Embeddings of the prompts and of the negative prompts; each distinct text is encoded once."""
    styled = tuple(with_style(prompt, request.styles) for prompt in request.prompts)
    texts = sorted({*styled, *request.negative_prompts})
    embeds = parts.text_encoder(texts)
    _check_finite("the text encoder", embeds.tokens)

    def rows(prompts: tuple[str, ...]) -> PromptEmbeds:
        index = torch.tensor([texts.index(prompt) for prompt in prompts], device=embeds.tokens.device)
        mask = None if embeds.mask is None else embeds.mask[index]
        return PromptEmbeds(embeds.tokens[index], mask, embeds.pooled[index])

    return rows(styled), rows(request.negative_prompts)


def with_style(prompt: str, styles: Styles) -> str:
    """The prompt with the default style at its end, unless it is empty or names a style.

    A style's words count in upper and lower case, but not as parts of longer words.
    """
    bare = prompt.rstrip(" \t\n,.")
    if not bare or not styles.default:
        return prompt
    text = " ".join(bare.split()).casefold()
    named = (re.escape(" ".join(phrase.split()).casefold()) for phrase in (*styles.words, styles.default))
    if any(re.search(rf"(?<!\w){phrase}(?!\w)", text) for phrase in named):
        return prompt
    return f"{bare}, {styles.default}"


def seeded_noise(parts: Parts, request: Request) -> Callable[[], Latents]:
    """Draws latents of standard normal noise, each picture's from its own generator.

    On the CPU in float32, so that a seed gives one picture whatever the device and the batch.
    """
    factor = parts.vae.config.factor
    shape = (parts.vae.config.latent_channels, request.height // factor, request.width // factor)
    generators = [torch.Generator().manual_seed(seed) for seed in request.seeds]
    target = parts.unet.conv_out.weight

    def draw() -> Latents:
        return torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(target)

    return draw


def plan(parts: Parts, request: Request) -> list[Level]:
    """The levels to walk: all of them, or the last ones that image-to-image's strength leaves (at least one)."""
    levels = sampling_levels(request.sampler, parts.scheduler, request.num_inference_steps)
    if request.image is None:
        return levels
    taken = max(1, min(int(request.num_inference_steps * request.strength), request.num_inference_steps))
    return levels[len(levels) - 1 - taken :]


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


def encode_image(parts: Parts, request: Request, noise: Latents) -> Known | None:
    """Latents of the picture to change, and its mask at their size; None for text-to-image."""
    if request.image is None:
        return None
    weight = parts.unet.conv_out.weight
    pixels = images.to_tensor([request.image]).to(weight)
    x0 = parts.vae.encode(pixels)
    _check_finite("the autoencoder's encoder", x0)
    if request.mask is None:
        return Known(x0, None, None, noise)
    mask = images.mask_tensor(request.mask, request.width, request.height).to(weight)
    masked = parts.vae.encode(pixels * (mask < 0.5)) if reads_mask(parts) else None
    return Known(x0, F.interpolate(mask, x0.shape[-2:]), masked, noise)


def reads_mask(parts: Parts) -> bool:
    """Whether the U-Net was made for inpainting: it reads a mask and masked latents beside the noisy ones."""
    return parts.unet.config.in_channels == 2 * parts.vae.config.latent_channels + 1


def begin(
    parts: Parts, request: Request, levels: list[Level], noise: Latents, known: Known | None
) -> Latents:
    """The latents to walk from: noise, or for image-to-image the picture noised to the first level."""
    if known is None or request.strength == 1:
        return initial_scale(request.sampler, parts.scheduler, levels[0]) * noise
    return levels[0].alpha * known.x0 + levels[0].sigma * noise


def denoiser(
    parts: Parts,
    embeds: tuple[PromptEmbeds, PromptEmbeds],
    guidance: Guidance,
    known: Known | None,
    first: Level,
) -> Denoiser:
    """The U-Net as a sampler sees it: guided, and for inpainting reminded of what is not repainted."""
    conditional, unconditional = embeds
    both = unconditional + conditional
    prediction_type = parts.scheduler.config.prediction_type

    reads_pooled = parts.unet.config.pooled_projection_dim is not None
    kept = None if known is None else known.kept
    extra = None
    if known is not None and known.mask is not None and known.masked is not None:
        extra = torch.cat([known.mask, known.masked], dim=1)

    def network(x: Latents, level: Level, text: PromptEmbeds) -> Latents:
        timesteps = torch.full((len(x),), level.t, dtype=torch.float32, device=x.device)
        if extra is not None:
            x = torch.cat([x, extra.expand(len(x), -1, -1, -1)], dim=1)
        return parts.unet(x, timesteps, text.tokens, text.mask, text.pooled if reads_pooled else None)

    def denoise(x: Latents, level: Level) -> Latents:
        if kept is not None and known is not None and level != first:
            # The kept part as the walk would have it: the picture with its own noise of this level.
            x = torch.where(kept, level.alpha * known.x0 + level.sigma * known.noise, x)
        if is_on(guidance, level, parts.scheduler):
            uncond, cond = network(torch.cat([x, x]), level, both).chunk(2)
            output = guide(cond, uncond, guidance)
        else:
            output = network(x, level, conditional)
        x0 = to_x0(prediction_type, output, x, level.alpha, level.sigma)
        return x0 if kept is None or known is None else torch.where(kept, known.x0, x0)

    return denoise
