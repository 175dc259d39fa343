"""Generation over the parts of a model: encode the text, draw noise, plan levels, begin, sample, decode."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from stable_diffusion import images
from stable_diffusion.config import ModelConfig
from stable_diffusion.diffusion.samplers import Step, initial_scale, sample, sampling_levels
from stable_diffusion.diffusion.schedule import Level, Schedule
from stable_diffusion.errors import InputError
from stable_diffusion.generation import syntax
from stable_diffusion.generation.denoise import Codec, Known, Network, denoiser
from stable_diffusion.generation.interpolate import mixed, slerp
from stable_diffusion.generation.prompt_weights import (
    Prompt,
    left_as_text,
    lora_weights,
    parse_prompt,
    without_loras,
)
from stable_diffusion.generation.request import Request
from stable_diffusion.generation.sizes import SEVERAL_SIZES
from stable_diffusion.generation.text import encode_texts, encode_weighted, with_style, with_style_words
from stable_diffusion.nn.text import PromptEmbeds, PromptEncoder

Latents = Float[Tensor, "b c h w"]
T = TypeVar("T", str, Prompt)


class Parts(Protocol):
    """What generation needs of a model."""

    @property
    def config(self) -> ModelConfig: ...
    @property
    def vae(self) -> Codec: ...
    @property
    def network(self) -> Network: ...
    @property
    def text_encoder(self) -> PromptEncoder: ...
    @property
    def scheduler(self) -> Schedule: ...

    def adapted(self, weights: Mapping[str, float]) -> AbstractContextManager[object]:
        """Within it, the networks compute with the LoRAs of these names, each at its weight, in this context alone."""
        ...

    def widened(self) -> Parts:
        """The same in float32, in memory of its own."""
        ...


@dataclass(frozen=True)
class Result:
    """What a request gave."""

    pictures: list[Image.Image]
    """Each has its own request as plain values in ``info["settings"]``."""
    notes: tuple[str, ...]
    """What the user should know, in sentences: words that were cut, a number format that was changed."""


class NonFinite(InputError):
    """A part of the model gave NaN or infinity."""


Steps = Generator[Step, bool | None, Result]
"""Yields the steps and returns the result. Sent True, it stops: what the network then saw in the noise is decoded."""


@dataclass(frozen=True)
class Pass:
    """One walk from noise to clean latents."""

    levels: list[Level]
    strength: float
    """1 where it begins with noise alone, else how much of what is there it changes."""
    scale: float
    """Of the request's width and height."""


def stream(parts: Parts, request: Request, passes: list[Pass]) -> Steps:
    """A request's steps along the passes of ``plan``; where 16 bits are too narrow, all of them in float32."""
    notes: list[str] = []
    network = parts.network
    if network.dtype == torch.float16 and network.device.type == "cpu":
        notes.append("float16 is not a format to compute in on a CPU: computing in float32, in a copy")
        parts = parts.widened()
    try:
        return (yield from generate(parts, request, passes, notes))
    except NonFinite:
        if parts.network.dtype not in (torch.float16, torch.bfloat16):
            raise
    notes = ["NaN or infinity in a 16-bit number format: computing again in float32"]
    return (yield from generate(parts.widened(), request, passes, notes))


def finished(steps: Steps) -> Result:
    """The result of a stream whose steps nobody looks at."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: Result = end.value
            return result


@torch.no_grad()
def generate(parts: Parts, request: Request, passes: list[Pass], notes: list[str]) -> Steps:
    """The method: from the request to noise, and from noise to pictures. Adds to the notes."""
    image, mask = fitted(parts, request, notes)
    lora = lora_weights(request)
    with parts.adapted(lora):
        embeds = encode_prompts(parts, request, notes)
    notes.extend(without_effect(parts, request))
    latents, done, total = None, 0, sum(len(each.levels) - 1 for each in passes)
    for each in passes:
        start, noise = seeded_noise(parts, request, each.scale)
        known = encode_image(parts, image, mask, start) if latents is None else enlarge(latents, start)
        x = begin(parts, request, each, start, known)
        with parts.adapted(lora):
            denoise = denoiser(parts.network, parts.scheduler, embeds, request.guidance, known, each.levels)
        steps = sample(request.sampler_config, denoise, x, each.levels, noise=noise)
        for index in range(done, done + len(each.levels) - 1):
            with parts.adapted(lora):
                step = replace(next(steps), index=index, total=total)
            _check_finite("the U-Net", step.x, f" at step {index + 1} of {total}")
            if index + 1 == total and known is not None and known.kept is not None:
                # The walk may end on a trace of noise.
                step = replace(step, x=torch.where(known.kept, known.x0, step.x))
            stopped = (yield step) is True
            if stopped:
                break
        latents, done = step.x0 if stopped else step.x, index + 1
        if stopped:
            break
    assert latents is not None, "a plan has a pass, and a pass a step"
    pictures = decode(parts, latents)
    if image is not None and mask is not None:
        pictures = [Image.composite(picture, image, mask) for picture in pictures]
    for i, picture in enumerate(pictures):
        picture.info["settings"] = request.picture(i).to_dict()
    return Result(pictures, tuple(notes))


def plan(parts: Parts, request: Request) -> list[Pass]:
    """The passes to walk: each along all levels, or along the last ones that its strength leaves (at least one)."""
    steps = request.num_inference_steps
    levels = sampling_levels(request.sampler_config, parts.scheduler, steps)

    def walk(strength: float, scale: float) -> Pass:
        taken = max(1, min(int(steps * strength), steps))
        return Pass(levels[len(levels) - 1 - taken :], strength, scale)

    first = walk(1.0 if request.image is None else request.strength, 1.0)
    return [first] if request.hires == 1 else [first, walk(request.hires_strength, request.hires)]


def without_effect(parts: Parts, request: Request) -> Iterator[str]:
    """Notes on what a request says in vain, or what its model does badly."""
    if any(request.negative_prompts):
        if parts.network.reads_guidance:
            yield "the negative prompt has no effect: this model reads its guidance as a number"
        elif request.guidance_scale <= 1:
            yield "the negative prompt has no effect: guidance is off at a scale of 1 and below"
    if request.variation_seed is not None and request.variation_strength == 0:
        yield "the variation seed has no effect: variation_strength is 0"
    if request.mix_prompt is not None and request.mix_strength == 0:
        yield "the prompt to mix in has no effect: mix_strength is 0"
    if request.hires > 1 and parts.config.sample_size < SEVERAL_SIZES:
        yield (
            f"this model knows pictures of {parts.config.sample_size} pixels alone, and hires makes others: enlarge"
            " its finished pictures instead"
        )


def fitted(parts: Parts, request: Request, notes: list[str]) -> tuple[Image.Image | None, Image.Image | None]:
    """The picture to change and the mask, black and white, at the request's size; a note says how a mask was read.

    The picture is of the mode that the model's pictures have.
    """
    size, image = (request.width, request.height), request.image
    if image is not None:
        image = image.convert("RGBA") if parts.config.alpha else images.to_rgb(image)
        image = images.cover(image, *size)
    if request.mask_image is None:
        return image, None
    mask, note = images.binary_mask(request.mask_image, *size)
    notes.extend(() if note is None else (note,))
    return image, mask


def encode_prompts(parts: Parts, request: Request, notes: list[str]) -> tuple[PromptEmbeds, PromptEmbeds]:
    """Embeddings of the prompts, with what is mixed in, and of the negative ones; each distinct one is encoded once."""
    styles, negative = parts.config.styles, request.negative_prompts
    ends = [request.prompts, (request.mix_prompt or "",) * len(request.prompts)]
    if request.mix_strength in (0, 1):
        ends = [ends[int(request.mix_strength)]]
    if request.prompt_syntax == "plain":
        styled = [[with_style(prompt, styles) for prompt in end] for end in ends]
        *prompts, negatives = _encoded(parts, [*styled, [*negative]], encode_texts, notes)
    else:
        texts = [[without_loras(prompt)[0] for prompt in end] for end in ends]
        if note := syntax.note_of(map(left_as_text, sorted({*negative}.union(*texts))), plain=False):
            notes.append(note)
        weighed = [[with_style_words(parse_prompt(text), styles) for text in end] for end in texts]
        *prompts, negatives = _encoded(
            parts, [*weighed, [*map(parse_prompt, negative)]], encode_weighted, notes
        )
    if len(prompts) == 1:
        return prompts[0], negatives
    return mixed(prompts[0], prompts[1], request.mix_strength), negatives


def _encoded(
    parts: Parts,
    batches: list[list[T]],
    encode: Callable[[PromptEncoder, list[T], list[str]], PromptEmbeds],
    notes: list[str],
) -> list[PromptEmbeds]:
    """Embeddings of each batch of prompts, from those of the distinct ones among all."""
    distinct: list[T] = sorted({prompt for batch in batches for prompt in batch})
    embeds = encode(parts.text_encoder, distinct, notes)
    _check_finite("the text encoder", embeds.tokens)

    def rows(prompts: list[T]) -> PromptEmbeds:
        index = torch.tensor([distinct.index(prompt) for prompt in prompts], device=embeds.tokens.device)
        mask = None if embeds.mask is None else embeds.mask[index]
        return PromptEmbeds(embeds.tokens[index], mask, embeds.pooled[index])

    return [rows(batch) for batch in batches]


def seeded_noise(parts: Parts, request: Request, scale: float = 1.0) -> tuple[Latents, Callable[[], Latents]]:
    """The noise that a pass begins with, and what samples more of it, each picture's from its own generator.

    On the CPU in float32, so that a seed gives one picture whatever the device and the batch. A variation's first
    noise lies between that of two seeds; all that follows is of the first.
    """
    vae, device, dtype = parts.config.vae, parts.network.device, parts.network.dtype
    height, width = (round(side // vae.factor * scale) for side in (request.height, request.width))

    def sampled(seeds: tuple[int, ...]) -> Callable[[], Latents]:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        shape = (vae.latent_channels, height, width)
        return lambda: torch.stack(
            [torch.randn(shape, generator=each, dtype=torch.float32, device="cpu") for each in generators]
        )

    noise = sampled(request.seeds)
    start = noise()
    if request.latents is not None and scale == 1:
        start = request.latents
    if request.variation_strength > 0:
        start = slerp(start.cpu(), sampled(request.variation_seeds)(), request.variation_strength)
    return start.to(device, dtype), lambda: noise().to(device, dtype)


def encode_image(
    parts: Parts, image: Image.Image | None, mask: Image.Image | None, noise: Latents
) -> Known | None:
    """Latents of the picture to change, and its mask at their size; None for text-to-image."""
    if image is None:
        return None

    def encode(pixels: Float[Tensor, "1 3 height width"]) -> Latents:
        return parts.vae.encode(pixels.to(parts.vae.device, parts.vae.dtype)).to(noise)

    pixels = images.to_tensor([image])
    x0 = encode(pixels)
    _check_finite("the autoencoder's encoder", x0)
    if mask is None:
        return Known(x0, None, None, noise)
    repaint = images.mask_tensor(mask)
    where = F.interpolate(repaint, x0.shape[-2:]).to(noise)
    if not where.any():
        factor = parts.config.vae.factor
        raise InputError(
            f"the white part of the mask lies between the latents, each of which is {factor}x{factor} pixels:"
            " draw it larger"
        )
    masked = encode(pixels * (1 - repaint)) if parts.config.reads_mask else None
    return Known(x0, where, masked, noise)


def enlarge(latents: Latents, noise: Latents) -> Known:
    """Latents at the size of the noise of the next pass.

    By cubic interpolation: repeated ones decode to steps, and linear interpolation takes a fifth of their contrast.
    """
    x0 = F.interpolate(latents.float(), noise.shape[-2:], mode="bicubic").to(noise)
    return Known(x0, None, None, noise)


def begin(parts: Parts, request: Request, each: Pass, noise: Latents, known: Known | None) -> Latents:
    """The latents to walk from: noise, or what is known, noised to the first level."""
    first = each.levels[0]
    if known is None or each.strength == 1:
        return initial_scale(request.sampler_config, parts.scheduler, first) * noise
    return first.alpha * known.x0 + first.sigma * noise


def decode(parts: Parts, latents: Latents) -> list[Image.Image]:
    """The pictures, one by one: for memory, and so that each has the same bytes in any batch."""
    latents = latents.to(parts.vae.device, parts.vae.dtype)
    pixels = torch.cat([parts.vae.decode(one[None]) for one in latents])
    _check_finite("the autoencoder's decoder", pixels)
    return images.to_pil(pixels.float())


def _check_finite(part: str, x: Tensor, when: str = "") -> None:
    if not torch.isfinite(x).all():
        raise NonFinite(
            f"{part} gave NaN or infinity{when}: its weights are damaged, or its number format too narrow;"
            " no picture was made"
        )
