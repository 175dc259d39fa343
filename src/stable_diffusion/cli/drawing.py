"""What ``minisd generate`` makes of a picture that is asked for: the picture, and what it says of it."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from stable_diffusion.cli.show import tell
from stable_diffusion.errors import InputError
from stable_diffusion.files import slug
from stable_diffusion.generation.request import Request

if TYPE_CHECKING:
    from PIL import Image

    from stable_diffusion import DiffusionModel
    from stable_diffusion.diffusion.samplers import Step

IDLE = {"variation_strength": "variation_seed", "mix_strength": "mix_prompt"}
"""Strengths of a request, each with the field that has no effect where the strength is 0."""


@dataclass(frozen=True, kw_only=True)
class Made:
    """A file that was written."""

    path: Path
    settings: Mapping[str, Any]
    seconds: float
    notes: Sequence[str]
    sheet: str | None = None
    """Of several pictures in one file, the words of the command that made it one."""

    def line(self) -> str:
        """All of it as one line of JSON."""
        told = {"path": str(self.path), "seed": self.settings["seed"], "seconds": round(self.seconds, 3)}
        told |= {"notes": [*self.notes]} | ({} if self.sheet is None else {"sheet": self.sheet})
        return json.dumps({**told, "settings": self.settings})


@dataclass(frozen=True)
class Drawn:
    """A picture, and what drawing it took."""

    picture: Image.Image
    seconds: float
    notes: tuple[str, ...]

    @property
    def settings(self) -> dict[str, Any]:
        """All that made it."""
        return dict(self.picture.info["settings"])


class Work(Protocol):
    """What is made of each picture that the command asks for."""

    def fields(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Of the fields that the command gives, those of the first request."""
        ...

    def requests(
        self, build: Callable[..., Request], asked: Mapping[str, Any], one: Request
    ) -> list[Request]:
        """What is drawn for one picture; `build` makes a request of fields. Raises InputError for what cannot be."""
        ...

    def make(self, model: DiffusionModel, requests: Sequence[Request], output: Path) -> Iterator[Made]:
        """Draws the requests and writes files."""
        ...


class Plain:
    """The picture."""

    def fields(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        return dict(asked)

    def requests(
        self, build: Callable[..., Request], asked: Mapping[str, Any], one: Request
    ) -> list[Request]:
        return [one]

    def make(self, model: DiffusionModel, requests: Sequence[Request], output: Path) -> Iterator[Made]:
        from stable_diffusion.generation.metadata import save_png

        (request,) = requests
        drawn = draw(model, request)
        path = save_png(drawn.picture, place(output, request), drawn.settings)
        yield Made(path=path, settings=drawn.settings, seconds=drawn.seconds, notes=drawn.notes)


def draw(model: DiffusionModel, request: Request, callback: Callable[[Step], object] | None = None) -> Drawn:
    """One picture: alone, so that it has the same bytes whether others are made beside it or not."""
    from stable_diffusion.progress import show_steps

    began, steps = time.perf_counter(), 0

    def count(step: Step) -> None:
        nonlocal steps
        steps += 1
        if callback is not None:
            callback(step)

    result = show_steps(model.stream(request), request.num_inference_steps, count)
    seconds = time.perf_counter() - began
    for note in result.notes:
        warnings.warn(note, stacklevel=1)
    tell(f"{steps} step{'s' * (steps != 1)}, {steps / seconds:.1f} a second")
    (picture,) = result.pictures
    return Drawn(picture, seconds, result.notes)


def joined(drawn: Iterable[Drawn]) -> tuple[float, list[str]]:
    """The seconds of several pictures in all, and the notes of any of them."""
    drawn = [*drawn]
    return sum(each.seconds for each in drawn), [
        *dict.fromkeys(note for each in drawn for note in each.notes)
    ]


def place(output: Path, request: Request, end: str = "") -> Path:
    """Where a picture goes: into the folder `output` by prompt, seed and `end`, or `output` itself."""
    if output.suffix.lower() == ".png":
        return output.with_suffix(".png")
    name = slug(request.prompt[0].lower().replace(".", " "), "picture")
    return output / f"{name}-{request.seed}{end}.png"


def check_pixels(requests: Sequence[Request], what: str) -> None:
    """Raises InputError where the pictures have more pixels together than a file may have that is read again."""
    from stable_diffusion.images import MAX_PIXELS

    pixels = round(sum(each.width * each.height * each.hires**2 for each in requests))
    if pixels > MAX_PIXELS:
        raise InputError(
            f"{what} of {len(requests)} pictures would have {pixels:,} pixels, and {MAX_PIXELS:,} are the most:"
            " ask for fewer or smaller ones"
        )
