"""All that makes a picture, in one object: the options of the command, a PNG's settings and a server's body are it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from PIL import Image

from stable_diffusion.config import (
    Guidance,
    GuidanceScale,
    Interval,
    ModelConfig,
    Part,
    SamplerConfig,
    SamplerName,
    SpacingName,
)
from stable_diffusion.errors import InputError, shown, unknown_name
from stable_diffusion.fields import Rule, documented, to_dict, typed, within
from stable_diffusion.generation.given import texts, weights
from stable_diffusion.generation.sizes import check_size, default_size

LARGEST_SEED = 2**63 - 1
Seed = Annotated[int, within(0, LARGEST_SEED)]
Side = Annotated[int, within(1, 65_536)]
Strength = Annotated[float, Rule("above 0 and at most 1", lambda strength: 0 < strength <= 1)]


@dataclass(frozen=True, kw_only=True)
class Request:
    """A batch of pictures to make. Every field is set: ``Request.of`` takes a model's defaults for those not given.

    Raises:
        InputError: a value outside what its field says.
    """

    model: str | None
    """The model: a folder, ours or diffusers', a single file, or a hub name (owner/name)."""
    prompt: tuple[str, ...]
    """What to generate. One that names none of the model's styles gets its default style, if it has one."""
    negative_prompt: tuple[str, ...]
    """What to steer away from: one text for all prompts, or one for each."""
    prompt_syntax: Literal["plain", "a1111"] = "plain"
    """How prompts are read: as text, or with AUTOMATIC1111's (word:1.3), [word], BREAK, chunks and <lora:name:0.8>."""
    seed: Seed
    """Seed of the first picture, 0 to 2**63 - 1; each further one takes the next number, but variations share it."""
    num_inference_steps: Annotated[int, within(1, 100_000)]
    """Steps from noise to picture, at least 1."""
    guidance_scale: GuidanceScale
    """How strongly to follow the prompt; 1 and below is no guidance."""
    guidance_interval: Interval
    """Part of the noise range, from 0 (clean) to 1 (noise), in which guidance is on."""
    guidance_rescale: Part
    """Against overexposed pictures: how far to restore the contrast of the unguided prediction, 0 to 1."""
    sampler: SamplerName
    """How to get from noise to picture, by our name or another program's."""
    spacing: SpacingName | None
    """How the noise levels are spread; by default the sampler's own."""
    eta: Part | None
    """How much noise DDIM and TCD add, from 0, deterministic, to 1; by default their own, 0 and 0.3."""
    variance: Literal["small", "large"]
    """DDPM only: the variance of the noise of a step: small is the posterior's, large is beta."""
    width: Side
    """In pixels, a multiple of the model's factor; by default the image's width, or the model's own."""
    height: Side
    """In pixels, likewise."""
    num_images_per_prompt: Annotated[int, within(1, 100_000)] = 1
    """Pictures per prompt."""
    image: Image.Image | None = None
    """A picture to begin with."""
    mask_image: Image.Image | None = None
    """A picture of the image's shape, white where that is to be repainted; elsewhere the image's bytes stay (on white,
    for a model without opacity). Of one with transparency it is the opaque part if all of it is white, else the
    transparent part."""
    strength: Strength = 0.8
    """How much to change the image, above 0 (hardly) up to 1 (nothing of it is kept)."""
    variation_seed: Seed | None = None
    """Seed of another noise, towards which a variation turns that of `seed`; each further picture takes the next."""
    variation_strength: Part = 0.0
    """Variations of one picture: how far to turn the noise it begins with, 0 (not) to 1 (all the way)."""
    mix_prompt: str | None = None
    """A second prompt, whose embeddings are mixed into those of the prompt."""
    mix_strength: Part = 0.0
    """How much of the second prompt, 0 (nothing) to 1 (nothing else)."""
    hires: Annotated[float, within(1, 4)] = 1.0
    """Make the finished picture so many times as large, 1 to 4, and go on from it; for models that know larger ones."""
    hires_strength: Strength = 0.7
    """How much that second pass changes, as `strength` does."""
    prediction_type: str | None = None
    """What the U-Net predicts (epsilon, v_prediction), whatever the model's files say."""
    variant: str | None = None
    """Diffusers folders: files to prefer, such as fp16 or non_ema."""
    ema: bool = False
    """Single files: take the averaged weights where there are both."""
    vae: str | None = None
    """Another autoencoder: a folder or file of Stable Diffusion's, or TAESD's."""
    text_encoder: str | None = None
    """Another CLIP text encoder: its folder, or that of a diffusers pipeline."""
    lora: Mapping[str, float] = field(default_factory=dict)
    """LoRAs by name, each with its weight; those that are not named do not act."""
    embedding: tuple[str, ...] = ()
    """Textual inversions, each a file with :TOKEN after it or without."""
    latents: Any = field(default=None, compare=False)
    """Standard normal latents to begin with, ``b c h w``, one for each picture; None takes those of the seeds."""

    def __post_init__(self) -> None:
        for name in ("prompt", "negative_prompt"):
            object.__setattr__(self, name, texts(name, getattr(self, name)))
        if len(self.negative_prompt) not in (1, len(self.prompt)):
            raise InputError(
                f"negative_prompt must be one text or one for each of the {len(self.prompt)} prompts,"
                f" got {len(self.negative_prompt)}"
            )
        for name, hint in HINTS.items():
            if name not in ("prompt", "negative_prompt", "lora", "latents", *PICTURES):
                object.__setattr__(self, name, typed(hint, getattr(self, name), name))
        object.__setattr__(self, "lora", weights(self.lora))
        _ = self.guidance, self.sampler_config  # which check their own ranges
        if self.mask_image is not None:
            if self.image is None:
                raise InputError("mask_image needs the image that it masks: give image as well")
            from stable_diffusion import images  # with numpy, which help has no need of

            (width, height), sides = self.mask_image.size, self.image.size
            if not images.same_shape((width, height), sides):
                raise InputError(
                    f"the mask has {width}x{height} pixels and the image {sides[0]}x{sides[1]}: give a mask of the"
                    " image's shape"
                )
            if self.hires > 1:
                raise InputError(
                    "hires makes the whole picture anew, so it does not go with mask_image: repaint first, then give"
                    " the result as image"
                )
        if self.variation_strength > 0 and self.variation_seed is None:
            raise InputError(
                "variation_strength needs the seed of the other noise: give variation_seed as well"
            )
        if self.mix_strength > 0 and self.mix_prompt is None:
            raise InputError("mix_strength needs the prompt to mix in: give mix_prompt as well")

    @classmethod
    def of(cls, config: ModelConfig, **given: Any) -> Request:
        """The request of a model's defaults and the given fields.

        Args:
            config: the model's.
            given: fields by their names; None takes the default. Texts may stand alone, pictures as their paths,
                ``guidance_scale`` as a ``Guidance`` and ``sampler`` as a ``SamplerConfig``.

        Raises:
            InputError: an unknown field, or a value that the field cannot have.
        """
        values: dict[str, Any] = {"model": config.name, "prompt": None, "negative_prompt": ("",)}
        values |= _guidance(config.guidance) | {"num_inference_steps": config.num_inference_steps}
        values |= _sampler(config.sampler if given.get("sampler") is None else SamplerConfig())
        for name, value in given.items():
            if name not in FIELDS:
                raise unknown_field(name)
            if isinstance(value, Guidance):
                values |= _guidance(value)
            elif isinstance(value, SamplerConfig):
                values |= _sampler(value)
            elif value is not None or name == "model":
                values[name] = value
        values = _opened(values)
        strength = values.get("variation_strength")
        for name in ("seed", *(["variation_seed"] if isinstance(strength, Real) and strength != 0 else [])):
            values.setdefault(name, random_seed())
        return cls(**default_size(config, values.get("image")) | values)

    def check(self, config: ModelConfig, origin: Mapping[str, Any]) -> None:
        """Raises InputError where the model of that configuration and that origin cannot make this."""
        for name in LOADING:
            asked, own = getattr(self, name), origin.get(name, FIELDS[name].default)
            if own is not dataclasses.MISSING and asked != own:
                raise InputError(
                    f"{name} belongs to loading, and this model has {shown(own)}: load one with {shown(asked)}"
                )
        if config.unet.num_class_embeds is not None:
            raise InputError(f"the model {config.name!r} reads class labels, which no request has")
        if not config.text_encoders and any((*self.prompt, self.mix_prompt)):
            raise InputError(f"the model {config.name!r} has no text encoder: only an empty prompt fits")
        check_size(config, self.width, self.height)
        if self.mask_image is not None:
            from stable_diffusion import images  # with numpy, which help has no need of

            images.binary_mask(self.mask_image, self.width, self.height)
        if config.reads_mask and self.mask_image is None:
            raise InputError(
                f"the model {config.name!r} repaints parts of pictures: give image and mask_image"
            )
        factor = config.vae.factor
        shape = (len(self.prompts), config.vae.latent_channels, self.height // factor, self.width // factor)
        if self.latents is not None:
            from torch import Tensor  # which the command's help has no need of

            given: Any = (
                tuple(self.latents.shape) if isinstance(self.latents, Tensor) else shown(self.latents)
            )
            if given != shape:
                raise InputError(f"latents must be a tensor of the shape {shape}, got {given}")
            if self.latents.is_complex() or self.latents.is_meta:
                kind = "complex numbers" if self.latents.is_complex() else "the meta device, which holds none"
                raise InputError(f"latents must be a tensor of numbers, got {kind}")

    # One entry a picture.

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompt of each picture."""
        return tuple(text for text in self.prompt for _ in range(self.num_images_per_prompt))

    @property
    def negative_prompts(self) -> tuple[str, ...]:
        """The negative prompt of each picture."""
        each = self.negative_prompt * (len(self.prompt) // len(self.negative_prompt))
        return tuple(text for text in each for _ in range(self.num_images_per_prompt))

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seed of each picture; variations of one picture share it."""
        return self._counted(self.seed, 0 if self.variation_strength > 0 else 1)

    @property
    def variation_seeds(self) -> tuple[int, ...]:
        """The seed of each picture's other noise; none where there is no variation."""
        return () if self.variation_seed is None else self._counted(self.variation_seed, 1)

    def _counted(self, first: int, by: int) -> tuple[int, ...]:
        return tuple((first + by * i) % (LARGEST_SEED + 1) for i in range(len(self.prompts)))

    def picture(self, index: int) -> Request:
        """The request of one picture alone."""
        return dataclasses.replace(
            self,
            prompt=(self.prompts[index],),
            negative_prompt=(self.negative_prompts[index],),
            seed=self.seeds[index],
            variation_seed=self.variation_seeds[index] if self.variation_seeds else None,
            num_images_per_prompt=1,
            latents=None,
        )

    # As the mathematics reads it.

    @property
    def guidance(self) -> Guidance:
        """The guidance in one object."""
        return Guidance(
            scale=self.guidance_scale, interval=self.guidance_interval, rescale=self.guidance_rescale
        )

    @property
    def sampler_config(self) -> SamplerConfig:
        """The sampler in one object."""
        return SamplerConfig(name=self.sampler, spacing=self.spacing, eta=self.eta, variance=self.variance)

    # As JSON.

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: one prompt as a text, several as a list, a picture as its file's path.

        Fields that have a default are left out where they have it; so are `latents`, and pictures of no file.
        """
        result: dict[str, Any] = {}
        for name, described in FIELDS.items():
            value = getattr(self, name)
            if name in PICTURES and value is not None:
                value = value.info.get(_PATH)
            if name in ("prompt", "negative_prompt") and len(value) == 1:
                value = value[0]
            if name in ("strength", "hires_strength"):
                said = self.image is not None if name == "strength" else self.hires > 1
            else:
                said = name in REQUIRED or (name != "latents" and value not in (described.default, None, {}))
            if said:
                result[name] = list(value) if isinstance(value, tuple) else value
        return result

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Request:
        """The request that ``to_dict`` gave; its pictures are opened. For part of one, ``of(config, **parse(data))``.

        Raises:
            InputError: a field that is missing, unknown or of another type, or a picture that cannot be opened.
        """
        return cls(**_opened(parse(data, whole=True)))


FIELDS = {described.name: described for described in dataclasses.fields(Request)}
HINTS = get_type_hints(Request, include_extras=True)
REQUIRED = [
    name
    for name, described in FIELDS.items()
    if described.default is described.default_factory is dataclasses.MISSING
]
DOCS = documented(Request)
Request.__doc__ = f"{Request.__doc__}\n\nFields:\n" + "\n".join(f"    {name}: {DOCS[name]}" for name in DOCS)
SHORT = {
    "negative_prompt": "negative",
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "mask_image": "mask",
    "num_images_per_prompt": "count",
}
"""What people type for a field on the command line."""
PICTURES = ("image", "mask_image")
LOADING = ("model", "prediction_type", "variant", "ema", "vae", "text_encoder", "embedding")
"""Fields that say which model it is and how it was loaded: whoever loads it reads them."""
_PATH = ("path",)  # of a picture's file, in its `info`: no key that a file could have brought along


def parse(data: Mapping[str, Any], *, whole: bool = False) -> dict[str, Any]:
    """JSON values as fields; pictures stay paths.

    Args:
        data: the object.
        whole: whether it has to have every field without a default, as what ``to_dict`` gave does.

    Raises:
        InputError: an unknown field, a value of another type, or a field that is missing.
    """
    values: dict[str, Any] = {}
    if not isinstance(data, Mapping):
        raise InputError(f"a request must be an object of settings, got {shown(data)}")
    for name, value in data.items():
        if name not in FIELDS or name == "latents":
            raise unknown_field(name)
        if name == "lora":
            value = weights(value)
        elif name in PICTURES:
            value = typed(str, value, name)
        else:
            alone = name in ("prompt", "negative_prompt", "embedding") and isinstance(value, str)
            value = typed(HINTS[name], [value] if alone else value, name)
        values[name] = value
    if whole and (missing := [name for name in REQUIRED if name not in values]):
        raise InputError(f"{', '.join(missing)} not given")
    return values


def random_seed() -> int:
    """A seed where none is given."""
    return int.from_bytes(os.urandom(4), "big")


def unknown_field(name: str, among: Iterable[str] | None = None) -> InputError:
    """The error for a name that no field of `among` has; by default of all that can be given as JSON."""
    for field_name, short in SHORT.items():
        if name == short:
            return InputError(f"unknown setting {name!r}: here it is called {field_name!r}")
    return unknown_name("setting", name, FIELDS.keys() - {"latents"} if among is None else among)


def _guidance(guidance: Guidance) -> dict[str, Any]:
    return {f"guidance_{name}": getattr(guidance, name) for name in ("scale", "interval", "rescale")}


def _sampler(sampler: SamplerConfig) -> dict[str, Any]:
    settings = to_dict(sampler)
    return {"sampler": settings.pop("name"), **settings}


def _opened(values: dict[str, Any]) -> dict[str, Any]:
    """The values with pictures in place of their paths, which the pictures remember."""
    from stable_diffusion import images  # with numpy, likewise

    pictures: dict[str, Image.Image] = {}
    for name in PICTURES:
        value = values.get(name)
        if isinstance(value, (str, Path)):
            pictures[name] = (
                images.open_mask(value) if name == "mask_image" else images.open_image(value, alpha=True)
            )
            pictures[name].info = {_PATH: str(value)}  # type: ignore[dict-item]
        elif isinstance(value, Image.Image):
            if not all(value.size):
                raise InputError(f"{name} must have pixels, got {value.width}x{value.height} of them")
            pictures[name] = value if name == "mask_image" else images.with_alpha(value)
        elif value is not None:
            raise InputError(f"{name} must be a picture or the path of one, got {shown(value)}")
    return values | pictures
