"""What bodies of the OpenAI surface say: their fields, and what a mask means there."""

from __future__ import annotations

import dataclasses
import json
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from PIL import Image

from stable_diffusion import images
from stable_diffusion.config import ModelConfig
from stable_diffusion.errors import InputError
from stable_diffusion.fields import Rule, typed, within
from stable_diffusion.generation.request import PICTURES, parse
from stable_diffusion.generation.strangers import LIMITS, LONGEST, check_stranger
from stable_diffusion.serve.door import SETTINGS, Refused, read_picture

MOST_IMAGES = 10
MOST_PARTIAL = 3
LONGEST_SIDE = LIMITS["width"]

IGNORED = ("user", "safety_identifier", "moderation", "quality", "style", "input_fidelity", "complexity")
"""What the client may send, and what has no meaning for a model of ours."""
REFUSED = ("frame_count", "frame_duration_ms", "svg", "markup")
"""What would give something else than was asked for, were it ignored."""
OTHER_NAMES = {"steps": "num_inference_steps"}
EXTRAS = (
    *OTHER_NAMES,
    *(
        name
        for name in SETTINGS
        if name not in (*PICTURES, "prompt", "num_images_per_prompt", "width", "height")
    ),
)
"""Fields of ``Request`` that the client merges into its body (``extra_body``)."""

_SIZE = re.compile("([0-9]{1,4})x([0-9]{1,4})", re.IGNORECASE)


def _sides(size: str) -> tuple[int, int] | None:
    found = _SIZE.fullmatch(size)
    sides = (int(found[1]), int(found[2])) if found else (0, 0)
    return sides if all(1 <= side <= LONGEST_SIDE for side in sides) else None


Prompt = Annotated[str, Rule(f"at most {LONGEST:,} letters", lambda text: len(text) <= LONGEST)]
Size = Annotated[
    str,
    Rule(
        f"auto, or WIDTHxHEIGHT with sides from 1 to {LONGEST_SIDE}",
        lambda size: size == "auto" or _sides(size) is not None,
    ),
]


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a body asks for."""

    prompt: Prompt
    model: str | None = None
    n: Annotated[int, within(1, MOST_IMAGES)] = 1
    size: Size = "auto"
    """Of the files; auto is the image's size, or the model's own."""
    response_format: Literal["b64_json", "url"] = "b64_json"
    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: Annotated[int, within(0, 100)] = 100
    """The quality of jpeg and webp."""
    background: Literal["auto", "opaque", "transparent"] = "auto"
    stream: bool = False
    partial_images: Annotated[int, within(0, MOST_PARTIAL)] = 0
    """Of a stream."""
    extras: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """By the names of ``Request``, in plain values."""
    ignored: tuple[str, ...] = ()
    """Fields that nothing here knows."""

    def __post_init__(self) -> None:
        if self.stream and self.n > 1:
            raise Refused(f"a stream is of one picture: n must be 1, got {self.n}", field="n")
        if self.stream and self.response_format == "url":
            raise Refused(
                "the pictures of a stream are in it: leave response_format out", field="response_format"
            )
        if self.output_format == "png" and self.output_compression < 100:
            said = "output_compression is for jpeg and webp: leave it out, or choose one by output_format"
            raise Refused(said, field="output_compression")
        if self.output_format == "jpeg" and self.background == "transparent":
            raise Refused("jpeg has no transparency: choose png or webp by output_format", field="background")

    def check(self, config: ModelConfig) -> None:
        """Raises Refused for what the model cannot do."""
        if self.background == "transparent" and not config.alpha:
            said = f"the model {config.name!r} paints the whole picture: background must be auto or opaque"
            raise Refused(said, field="background")

    def fields(self) -> dict[str, Any]:
        """Those of ``Request``, for ``door.asked``."""
        fields = {**self.extras, "prompt": self.prompt, "num_images_per_prompt": self.n}
        if sides := _sides(self.size):
            fields["width"], fields["height"] = sides
        return fields


_OWN = {
    name: hint
    for name, hint in typing.get_type_hints(Wanted, include_extras=True).items()
    if name not in ("extras", "ignored")
}


def read(body: Mapping[str, Any], *, form: bool = False) -> Wanted:
    """What a body asks for; null is a field that is not given.

    Args:
        body: the fields as JSON has them.
        form: whether they are the texts of a form instead, in which numbers and the like are written as in JSON.

    Raises:
        Refused: what upstream does and this server does not, or a value that a field cannot have.
    """
    own: dict[str, Any] = {}
    extras: dict[str, Any] = {}
    ignored: list[str] = []
    for name, value in body.items():
        if value is None or name in IGNORED:
            continue
        bare = name.partition("[")[0]  # svg[model] in a form
        if bare in REFUSED:
            raise Refused(f"{bare} is not done here: leave it out", field=bare)
        if name not in _OWN and name not in EXTRAS:
            ignored.append(name)
            continue
        try:
            parsed = _from_text(name, value) if form else _parsed(name, value)
        except InputError as error:
            raise Refused(str(error), field=name) from error
        (own if name in _OWN else extras).update(parsed)
    if "prompt" not in own:
        raise Refused("prompt is missing: say what to generate", field="prompt")
    return Wanted(**own, extras=extras, ignored=tuple(ignored))


def _parsed(name: str, value: Any) -> dict[str, Any]:
    """The value under the name that it has here. Raises InputError for one that it cannot have."""
    if name in _OWN:
        return {name: typed(_OWN[name], value, name)}
    ours = OTHER_NAMES.get(name, name)
    try:
        check_stranger(parse({ours: value}))
    except InputError as error:
        raise InputError(str(error).replace(ours, name)) from error
    return {ours: value}


def _from_text(name: str, text: str) -> dict[str, Any]:
    try:
        return _parsed(name, text)
    except InputError as error:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            raise error from None
        return _parsed(name, value)


def opened(image: bytes | str, mask: bytes | str | None) -> dict[str, Image.Image]:
    """The image and the mask of an edit, as ``image`` and ``mask_image`` of ``Request``.

    In a mask with an alpha channel what is more transparent than not is repainted, whatever its colour; in one without,
    what is white.

    Raises:
        Refused: no pictures, shapes that differ, or a mask that repaints nothing.
    """
    pictures = {"image": read_picture(image, "image")}
    if mask is None:
        return pictures
    given = images.with_alpha(read_picture(mask, "mask"))
    (width, height), sides = given.size, pictures["image"].size
    if not images.same_shape((width, height), sides):
        raise Refused(
            f"the mask has {width}x{height} pixels and the image {sides[0]}x{sides[1]}: make them equal",
            field="mask",
        )
    if given.mode == "RGBA":
        repainted = given.getchannel("A").point(lambda alpha: 255 if alpha < 128 else 0)
        how = "make transparent what is to be repainted, or send black and white without an alpha channel"
    else:
        repainted = given.convert("L").point(lambda level: 255 if level > 127 else 0)
        how = "make white, or transparent, what is to be repainted"
    if repainted.getbbox() is None:
        raise Refused(f"the mask repaints nothing: {how}", field="mask")
    return {**pictures, "mask_image": repainted}
