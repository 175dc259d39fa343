"""The door: what clients send, which may be anything, as a request that one of the models can make."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import io
import math
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from stable_diffusion import images
from stable_diffusion.checkpoints import hub
from stable_diffusion.config import ModelConfig
from stable_diffusion.errors import InputError, shown, unknown_name
from stable_diffusion.generation.given import split_file
from stable_diffusion.generation.pipeline import fitted
from stable_diffusion.generation.request import (
    FIELDS,
    LOADING,
    PICTURES,
    Request,
    parse,
    unknown_field,
)
from stable_diffusion.generation.sizes import SEVERAL_SIZES
from stable_diffusion.generation.strangers import LIMITS, check_stranger
from stable_diffusion.model import DiffusionModel

FORMATS = ("PNG", "JPEG", "WEBP")
MOST_PIXELS = 16_000_000
"""Of a picture that a client sends."""
LONGEST_SIDE = 16_384
"""Of such a picture: resizing holds a table of the filter for each pixel of a side."""
SETTINGS = tuple(name for name in FIELDS if name not in (*LOADING, "latents"))
"""What clients choose."""


class Refused(InputError):
    """What a client may not ask for, or what is not there.

    Attributes:
        status: of HTTP.
        field: the field that is at fault, as the client calls it.
        headers: of the answer.
    """

    def __init__(
        self,
        said: str,
        *,
        status: int = 400,
        field: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(said)
        self.status = status
        self.field = field
        self.headers = dict(headers or {})


@dataclass(frozen=True, kw_only=True)
class Served:
    """A model under the name by which clients choose it."""

    name: str
    model: DiffusionModel
    created: int
    """When it was loaded, in seconds since 1970."""

    @property
    def config(self) -> ModelConfig:
        """The model's."""
        return self.model.config

    @property
    def packaged(self) -> bool:
        """Whether it is the one in the package, which settings without a model mean."""
        return self.model.origin["model"] is None

    @property
    def loras(self) -> dict[str, float]:
        """The LoRAs that were named at the start, each with its weight where a request says nothing."""
        return dict(self.model.adapters.weights)

    def public(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """A picture's settings as clients may read them: with names, and no folder of this machine."""
        found = dict(settings)
        if found["model"] is not None and not _is_of_hub(found["model"]):
            found["model"] = self.name
        for field in ("vae", "text_encoder"):
            if field in found and not _is_of_hub(found[field]):
                found[field] = _file_name(found[field])
        if "embedding" in found:
            parts = (split_file(text) for text in found["embedding"])
            found["embedding"] = [":".join(filter(None, (_file_name(file), word))) for file, word in parts]
        return found


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request at a size that the model knows, and what makes the pictures those that were asked for."""

    request: Request
    """Its image and mask have the size that is generated."""
    finish: Callable[[Image.Image], Image.Image]
    notes: tuple[str, ...] = ()
    """What the mask was taken for, say."""
    bytes: int = 0
    """Of the pictures that both of them hold."""


class Models:
    """The models that were named at the start; the first one is taken where no other is chosen."""

    def __init__(self, served: list[Served]) -> None:
        assert served, "a server has a model"
        self.all = {each.name: each for each in served}
        self.default = served[0]

    def named(self, name: Any) -> Served:
        """The model of that name; None takes the default. Raises Refused, 404, for one that is not there."""
        if name is None:
            return self.default
        if not isinstance(name, str) or name not in self.all:
            error = unknown_name("model", name, self.all)
            raise Refused(f"{error}; models are named when the server starts", status=404, field="model")
        return self.all[name]


def _is_of_hub(text: str) -> bool:
    return hub.NAME.fullmatch(hub.stored_name(text)) is not None


def _file_name(path: str) -> str:
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1]


def asked(served: Served, fields: Mapping[str, Any]) -> Asked:
    """A request from JSON values under the names of ``Request``.

    Pictures are data URIs, base64, bytes, or PIL images that this server opened itself. Width and height may be any:
    the picture is generated at a size that the model knows, and scaled. Where a mask is given and the size is the
    image's, the bytes outside of the mask are the image's.

    Raises:
        InputError: a field that is unknown, that clients do not choose, or has a value that it cannot have; Refused
            where it is known which.
    """
    values = {name: value for name, value in fields.items() if value is not None}
    for name in values:
        if name not in FIELDS:
            raise Refused(str(unknown_field(name, SETTINGS)), field=name)
    for name in LOADING:
        if name in values:
            raise Refused(f"{name} is chosen when the server starts: leave it out", field=name)
    if "latents" in values:
        raise Refused("latents are not taken over HTTP: leave them out", field="latents")
    pictures = {name: read_picture(values.pop(name), name) for name in PICTURES if name in values}
    for name in values:
        try:
            values |= parse({name: values[name]})
        except InputError as error:
            raise Refused(str(error), field=name) from None
    if "prompt" not in values:
        raise Refused("prompt is missing: say what to generate", field="prompt")
    for name in values.get("lora", {}):
        if name not in served.loras:
            raise Refused(
                f"{unknown_name('LoRA', name, served.loras)}; LoRAs are named when the server starts",
                field="lora",
            )
    try:
        check_stranger(values)
        own = served.config.sample_size
        size = pictures["image"].size if "image" in pictures else (own, own)
        size = values.pop("width", size[0]), values.pop("height", size[1])
        if max(size) > LIMITS["width"]:  # an image's own
            size = scaled_down(size)
        if (longest := round(max(size) * values.get("hires", 1))) > LIMITS["width"]:
            said = f"hires would make the picture {longest} pixels long, and {LIMITS['width']} are the most: lower it"
            raise Refused(said, field="hires")
        width, height = drawn_size(served.config, *size)
        request = served.model.request(values.pop("prompt"), **values, **pictures, width=width, height=height)
        served.model.stream(request).close()  # says what is wrong with it, and generates nothing
        return _fitted(served.model, request, size)
    except Refused:
        raise
    except InputError as error:
        first = re.match(r"\w+", str(error))
        raise Refused(str(error), field=first[0] if first and first[0] in FIELDS else None) from None


def _fitted(model: DiffusionModel, request: Request, size: tuple[int, int]) -> Asked:
    """The request with its pictures at the size that is generated: what waits in the queue takes no more memory."""
    notes: list[str] = []
    before, area = None, None  # the image and its mask at the size that was asked for
    if request.mask_image is not None and size != (request.width, request.height):
        before, area = fitted(model, dataclasses.replace(request, width=size[0], height=size[1]), [])
    image, mask = fitted(model, request, notes)
    if image is not None:
        image.info = {}  # which may hold a file's every text
        request = dataclasses.replace(request, image=image, mask_image=mask)

    def finish(picture: Image.Image) -> Image.Image:
        whole = round(size[0] * request.hires), round(size[1] * request.hires)
        if picture.size == whole:
            return picture
        picture = picture.resize(whole, Image.Resampling.LANCZOS)
        if before is not None and area is not None:
            picture = Image.composite(picture, before.convert(picture.mode), area)
        return picture

    pictures = (request.image, request.mask_image, before, area)
    held = sum(each.width * each.height * len(each.getbands()) for each in pictures if each is not None)
    return Asked(request=request, finish=finish, notes=tuple(notes), bytes=held)


def scaled_down(size: tuple[int, int]) -> tuple[int, int]:
    """A size in that shape whose longer side is the most that is allowed."""
    factor = LIMITS["width"] / max(size)
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def drawn_size(config: ModelConfig, width: int, height: int) -> tuple[int, int]:
    """The size to generate for one of any size: that shape, multiples of the factor, and about the model's area.

    Small models know one size. Those of ``SEVERAL_SIZES`` and more are also good at up to 2.25 times their area, for
    Stable Diffusion 768x768.
    """
    factor, own = config.vae.factor, config.sample_size
    area = width * height
    largest = 2.25 * own**2 if own >= SEVERAL_SIZES else own**2
    scale = 1.0
    if not own**2 <= area <= largest:
        scale = math.sqrt((largest if area > largest else own**2) / area)
    sides = (max(factor, round(side * scale / factor) * factor) for side in (width, height))
    wide, high = (min(side, 4 * own // factor * factor) for side in sides)
    return wide, high


def read_picture(value: Any, field: str) -> Image.Image:
    """The picture of a data URI, of base64, or of a file's bytes; the content decides, not the name.

    Raises:
        Refused: anything else, other formats than ``FORMATS``, damage, more than ``MOST_PIXELS``, or a side above
            ``LONGEST_SIDE``.
    """
    if isinstance(value, Image.Image):
        return value
    if isinstance(value, str):
        value = _decoded(value, field)
    if not isinstance(value, bytes):
        raise Refused(f"{field} must be a picture in base64, got {shown(value)}", field=field)
    content = io.BytesIO(value)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's, of large pictures
            with Image.open(content, formats=FORMATS) as image:
                width, height = image.size
    except Exception as error:  # PIL's decoders raise many kinds on hostile headers
        raise Refused(
            f"{field} is not a picture that can be read: send a PNG, JPEG or WebP file", field=field
        ) from error
    if width * height > MOST_PIXELS:
        raise Refused(
            f"{field} has {width}x{height} pixels, and {MOST_PIXELS:,} are the most: make it smaller",
            field=field,
        )
    if max(width, height) > LONGEST_SIDE:
        raise Refused(
            f"{field} has {width}x{height} pixels, and {LONGEST_SIDE:,} are the most of a side: make it smaller",
            field=field,
        )
    content.seek(0)
    try:
        with images.opened(field, content) as image:
            return images.loaded(image).copy()
    except InputError as error:
        raise Refused(str(error), field=field) from error


def _decoded(text: str, field: str) -> bytes:
    if text[:5].lower() == "data:":
        text = text.partition(",")[2]
    elif "://" in text[:12]:
        raise Refused(
            f"{field} is an address, and nothing is fetched: send the picture itself in base64", field=field
        )
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refused(f"{field} must be a picture in base64, got {shown(text, 40)}", field=field) from error
