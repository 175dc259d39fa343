"""``minisd generate --sweep``: one picture with many values of one setting, or of two or three."""

from __future__ import annotations

import csv
import itertools
import math
import shlex
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from stable_diffusion.cli.drawing import IDLE, Made, check_pixels, draw, joined, place
from stable_diffusion.errors import InputError, shown, unknown_name
from stable_diffusion.generation.request import (
    FIELDS,
    HINTS,
    LOADING,
    PICTURES,
    SHORT,
    Request,
    parse,
    random_seed,
)

if TYPE_CHECKING:
    from PIL import Image

    from stable_diffusion import DiffusionModel

MOST_AXES, MOST_CELLS = 3, 100
_NAMES = {short: name for name, short in SHORT.items()}
_FIXED = {*LOADING, "lora", "guidance_interval", "num_images_per_prompt", "latents"}
"""Fields that cannot vary: those of loading, and those that are no single value."""


@dataclass(frozen=True)
class Axis:
    """A setting and its values."""

    name: str
    """As it was typed."""
    values: tuple[str, ...]
    fields: tuple[dict[str, Any], ...]
    """What each value says of a request."""

    @property
    def labels(self) -> list[str]:
        """What stands beside each value's pictures."""
        return [f"{self.name} {value}" for value in self.values]


def axis(word: str, size: Callable[[str], dict[str, int]]) -> Axis:
    """The axis that a word such as ``guidance=1,3,5`` says.

    Args:
        word: of the command line; values that have commas stand in double quotes.
        size: reads width and height.

    Raises:
        InputError: no such word, a name that is no setting or cannot vary, or a value that it cannot have.
    """
    said, _, rest = word.partition("=")
    name = said.strip().replace("-", "_")
    name = _NAMES.get(name, name)
    try:
        values = tuple(next(csv.reader([rest], skipinitialspace=True, strict=True), ()))
    except csv.Error as error:
        raise InputError(f"the values of --sweep {shown(word)} cannot be read: {error}") from None
    if not name or not values:
        raise InputError(f"--sweep takes NAME=VALUE,VALUE such as guidance=1,3,5, got {shown(word)}")
    if name != "size" and name not in FIELDS.keys() - _FIXED:
        if name in FIELDS:
            raise InputError(f"--sweep cannot vary {said}: make a picture for each value")
        raise unknown_name(
            "setting of --sweep", said, {*_NAMES, "size", *FIELDS} - _FIXED - {SHORT["num_images_per_prompt"]}
        )
    read = size if name == "size" else lambda value: parse({name: _value(name, said, value)})
    return Axis(said, values, tuple(read(value) for value in values))


def _value(name: str, said: str, text: str) -> Any:
    """A text as the type that the field has."""
    hint = str if name in ("prompt", "negative_prompt", *PICTURES) else HINTS[name]
    while typing.get_args(hint) and typing.get_origin(hint) is not Literal:
        inner = typing.get_args(hint)
        hint = (
            inner[0]
            if typing.get_origin(hint) is Annotated
            else next(one for one in inner if one is not type(None))
        )
    if hint not in (int, float):
        return text
    try:
        return hint(text)
    except ValueError:
        kind = "a whole number" if hint is int else "a number"
        raise InputError(f"{said} must be {kind}, got {shown(text)}") from None


class Sweep:
    """A picture for every combination of the axes' values, each as the command alone would make it, on one sheet.

    Values of the first axis stand beside each other, those of the second below each other, those of the third in
    blocks. All have one seed.
    """

    def __init__(self, words: Sequence[str], size: Callable[[str], dict[str, int]]) -> None:
        self.axes = [axis(word, size) for word in words]
        self.words = f"--sweep {shlex.join(words)}"
        names = [name for each in self.axes for name in each.fields[0]]
        if twice := [name for name in names if names.count(name) > 1]:
            raise InputError(f"--sweep varies {twice[0]} twice: give each setting once")
        if len(self.axes) > MOST_AXES:
            raise InputError(f"--sweep takes at most {MOST_AXES} settings, got {len(self.axes)}")
        count = math.prod(len(each.values) for each in self.axes)
        if count > MOST_CELLS:
            raise InputError(f"--sweep makes at most {MOST_CELLS} pictures, got {count:,}: give fewer values")

    def fields(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        first = dict(asked)
        for each in self.axes:
            first |= each.fields[0]
        if "variation_strength" in first:  # one for all
            first.setdefault("variation_seed", random_seed())
        return first

    def requests(
        self, build: Callable[..., Request], asked: Mapping[str, Any], one: Request
    ) -> list[Request]:
        own = {"prompt": one.prompt, "negative_prompt": one.negative_prompt, "num_images_per_prompt": 1}
        own |= {name: getattr(one, name) for name in ("seed", "variation_seed", *PICTURES)}
        requests = []
        for changes in itertools.product(*(each.fields for each in reversed(self.axes))):
            values = {**asked, **own}
            for change in changes:
                values |= change
            for strength, name in IDLE.items():
                if values.get(strength) == 0:
                    values[name] = None
            requests.append(build(**values))
        check_pixels(requests, "a sheet")
        return requests

    def make(self, model: DiffusionModel, requests: Sequence[Request], output: Path) -> Iterator[Made]:
        from stable_diffusion.generation.metadata import save_png

        drawn = [draw(model, request) for request in requests]
        picture = self.sheet([each.picture for each in drawn])
        seconds, notes = joined(drawn)
        settings = drawn[0].settings
        path = save_png(picture, place(output, requests[0], "-sweep"), settings, sheet=self.words)
        yield Made(path=path, settings=settings, seconds=seconds, notes=notes, sheet=self.words)

    def sheet(self, pictures: Sequence[Image.Image]) -> Image.Image:
        """The pictures in the order of ``requests``, as one."""
        from stable_diffusion.cli.sheet import Block, sheet, wrapped

        columns = self.axes[0].labels
        if len(self.axes) == 1:
            return sheet(wrapped(columns, pictures))
        rows = self.axes[1].labels
        titles = self.axes[2].labels if len(self.axes) == MOST_AXES else [""]
        cells = iter(pictures)
        return sheet(
            [
                Block(
                    title=title,
                    columns=columns,
                    rows=[(row, [*itertools.islice(cells, len(columns))]) for row in rows],
                )
                for title in titles
            ]
        )
