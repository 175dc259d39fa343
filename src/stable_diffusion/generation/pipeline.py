"""Generation over the parts of a model: encode the text, draw noise, plan levels, begin, sample, decode."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from stable_diffusion import images
from stable_diffusion.config import ModelConfig, Styles
from stable_diffusion.diffusion.samplers import Step, initial_scale, sample, sampling_levels
from stable_diffusion.diffusion.schedule import Level, Schedule
from stable_diffusion.errors import InputError, shortened, shown
from stable_diffusion.generation import syntax
from stable_diffusion.generation.denoise import Codec, Known, Network, denoiser
from stable_diffusion.generation.request import Request
from stable_diffusion.generation.weights import (
    Piece,
    Prompt,
    lora_weights,
    parse,
    unobeyed,
    without_loras,
    words_of,
)
from stable_diffusion.nn import weighted
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


def stream(parts: Parts, request: Request, levels: list[Level]) -> Steps:
    """A request's steps along levels that ``plan`` gave; where 16 bits are too narrow, all of them in float32."""
    notes: list[str] = []
    network = parts.network
    if network.dtype == torch.float16 and network.device.type == "cpu":
        notes.append("float16 is not a format to compute in on a CPU: computing in float32, in a copy")
        parts = parts.widened()
    try:
        return (yield from generate(parts, request, levels, notes))
    except NonFinite:
        if parts.network.dtype not in (torch.float16, torch.bfloat16):
            raise
    notes = ["NaN or infinity in a 16-bit number format: computing again in float32"]
    return (yield from generate(parts.widened(), request, levels, notes))


def finished(steps: Steps) -> Result:
    """The result of a stream whose steps nobody looks at."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: Result = end.value
            return result


@torch.no_grad()
def generate(parts: Parts, request: Request, levels: list[Level], notes: list[str]) -> Steps:
    """The method: from the request to noise, and from noise to pictures. Adds to the notes."""
    image, mask = fitted(parts, request, notes)
    lora = lora_weights(request)
    with parts.adapted(lora):
        embeds = encode_prompts(parts, request, notes)
    if any(request.negative_prompts):
        if parts.network.reads_guidance:
            notes.append("the negative prompt has no effect: this model reads its guidance as a number")
        elif request.guidance_scale <= 1:
            notes.append("the negative prompt has no effect: guidance is off at a scale of 1 and below")
    noise = seeded_noise(parts, request)
    drawn = noise()
    start = drawn if request.latents is None else request.latents.to(drawn)
    known = encode_image(parts, image, mask, start)
    x = begin(parts, request, levels, start, known)
    with parts.adapted(lora):
        denoise = denoiser(parts.network, parts.scheduler, embeds, request.guidance, known, levels)
    steps = sample(request.sampler_config, denoise, x, levels, noise=noise)
    while True:
        with parts.adapted(lora):
            step = next(steps)
        _check_finite("the U-Net", step.x, f" at step {step.index + 1} of {step.total}")
        last = step.index + 1 == step.total
        if last and known is not None and known.kept is not None:
            # The walk may end on a trace of noise.
            step = replace(step, x=torch.where(known.kept, known.x0, step.x))
        stopped = (yield step) is True
        if stopped or last:
            break
    pictures = decode(parts, step.x0 if stopped else step.x)
    if image is not None and mask is not None:
        pictures = [Image.composite(picture, image, mask) for picture in pictures]
    for i, picture in enumerate(pictures):
        picture.info["settings"] = request.picture(i).to_dict()
    return Result(pictures, tuple(notes))


def plan(parts: Parts, request: Request) -> list[Level]:
    """The levels to walk: all of them, or the last ones that image-to-image's strength leaves (at least one)."""
    steps = request.num_inference_steps
    levels = sampling_levels(request.sampler_config, parts.scheduler, steps)
    if request.image is None:
        return levels
    taken = max(1, min(int(steps * request.strength), steps))
    return levels[len(levels) - 1 - taken :]


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
    """Embeddings of the prompts and of the negative prompts; each distinct one is encoded once."""
    styles, negative = parts.config.styles, request.negative_prompts
    if request.prompt_syntax == "plain":
        styled = [with_style(prompt, styles) for prompt in request.prompts]
        return _encoded(parts, [*styled, *negative], encode_texts, notes)
    texts = [without_loras(prompt)[0] for prompt in request.prompts]
    if note := syntax.note_of(map(unobeyed, sorted({*texts, *negative})), plain=False):
        notes.append(note)
    prompts = [with_style_words(parse(text), styles) for text in texts]
    return _encoded(parts, [*prompts, *map(parse, negative)], encode_weighted, notes)


def _encoded(
    parts: Parts,
    prompts: list[T],
    encode: Callable[[PromptEncoder, list[T], list[str]], PromptEmbeds],
    notes: list[str],
) -> tuple[PromptEmbeds, PromptEmbeds]:
    """Embeddings of the first half of the prompts and of the second, from those of the distinct ones among all."""
    distinct: list[T] = sorted(set(prompts))
    embeds = encode(parts.text_encoder, distinct, notes)
    _check_finite("the text encoder", embeds.tokens)

    def rows(prompts: list[T]) -> PromptEmbeds:
        index = torch.tensor([distinct.index(prompt) for prompt in prompts], device=embeds.tokens.device)
        mask = None if embeds.mask is None else embeds.mask[index]
        return PromptEmbeds(embeds.tokens[index], mask, embeds.pooled[index])

    half = len(prompts) // 2
    return rows(prompts[:half]), rows(prompts[half:])


def encode_texts(text_encoder: PromptEncoder, texts: list[str], notes: list[str]) -> PromptEmbeds:
    """Embeddings of texts; notes name the words beyond an encoder's context, and what other programs would obey."""
    if note := syntax.note_of(texts):
        notes.append(note)
    batches = text_encoder.tokenize(texts)
    for batch, tokenizer in zip(batches, text_encoder.tokenizers, strict=True):
        _note_cut(texts, batch.cut, f"{tokenizer.context_length} tokens", notes)
    return text_encoder.embed(batches, len(texts))


def encode_weighted(text_encoder: PromptEncoder, prompts: list[Prompt], notes: list[str]) -> PromptEmbeds:
    """Embeddings of prompts whose words have weights; notes name the words that a BERT has no room for."""
    batches = weighted.tokenize(text_encoder, prompts)
    texts, berts = [words_of(prompt) for prompt in prompts], []
    for batch, config in zip(batches, text_encoder.configs, strict=True):
        berts.append(config.architecture == "bert")
        most = f"{config.context_length} tokens" if berts[-1] else f"{weighted.MOST} chunks"
        _note_cut(texts, batch.cut, most, notes)
    if all(berts) and any(len(prompt) > 1 for prompt in prompts):
        notes.append("BREAK begins nothing new: this model reads a prompt in one piece")
    return weighted.embed(text_encoder, batches, len(prompts))


def _note_cut(texts: list[str], cuts: list[str], limit: str, notes: list[str]) -> None:
    """Adds a note for each text of which an encoder leaves words out."""
    for text, cut in zip(texts, cuts, strict=True):
        if cut:
            notes.append(
                f"the prompt {shortened(text, 40)!r} is longer than the {limit} that the model reads; these"
                f" words are left out: {shown(cut, 1000)}"
            )


STYLE_STRIPS = " \t\n,."
"""Characters at a prompt's end for which the comma before the style stands."""


def with_style(prompt: str, styles: Styles) -> str:
    """The prompt with the default style at its end, unless it is empty or names a style.

    A style's words count in upper and lower case, but not as parts of longer words.
    """
    bare = prompt.rstrip(STYLE_STRIPS)
    if not bare or not styles.default:
        return prompt
    text = " ".join(bare.split()).casefold()
    named = (re.escape(" ".join(phrase.split()).casefold()) for phrase in (*styles.words, styles.default))
    if any(re.search(rf"(?<!\w){phrase}(?!\w)", text) for phrase in named):
        return prompt
    return f"{bare}, {styles.default}"


def with_style_words(prompt: Prompt, styles: Styles) -> Prompt:
    """``with_style`` for a prompt whose words have weights; the style's have the weight 1."""
    words = words_of(prompt)
    if with_style(words, styles) == words:
        return prompt
    *before, last = prompt
    *pieces, (text, weight) = last or (Piece("", 1.0),)
    kept, style = text.rstrip(STYLE_STRIPS), f", {styles.default}"
    end = (Piece(kept + style, 1.0),) if weight == 1 else (Piece(kept, weight), Piece(style, 1.0))
    return (*before, (*pieces, *end))


def seeded_noise(parts: Parts, request: Request) -> Callable[[], Latents]:
    """Samples latents of standard normal noise, each picture's from its own generator.

    On the CPU in float32, so that a seed gives one picture whatever the device and the batch.
    """
    vae = parts.config.vae
    shape = (vae.latent_channels, request.height // vae.factor, request.width // vae.factor)
    generators = [torch.Generator().manual_seed(seed) for seed in request.seeds]
    device, dtype = parts.network.device, parts.network.dtype

    def draw() -> Latents:
        noise = torch.stack(
            [torch.randn(shape, generator=each, dtype=torch.float32, device="cpu") for each in generators]
        )
        return noise.to(device, dtype)

    return draw


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


def begin(
    parts: Parts, request: Request, levels: list[Level], noise: Latents, known: Known | None
) -> Latents:
    """The latents to walk from: noise, or for image-to-image the picture noised to the first level."""
    if known is None or request.strength == 1:
        return initial_scale(request.sampler_config, parts.scheduler, levels[0]) * noise
    return levels[0].alpha * known.x0 + levels[0].sigma * noise


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
