"""``minisd generate --interpolate``: the way from one picture to another; and ``--progressive``: from noise to one."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stable_diffusion.cli.drawing import IDLE, Made, Plain, check_pixels, draw, joined, place
from stable_diffusion.errors import InputError
from stable_diffusion.generation.request import Request

if TYPE_CHECKING:
    from PIL import Image

    from stable_diffusion import DiffusionModel
    from stable_diffusion.diffusion.samplers import Step

FRAMES, MOST_FRAMES = 8, 1000
FRAME_MS, REST_MS = 100, 500
"""How long an animation shows a frame, and its two ends."""
CELLS = 8


class Frames:
    """The pictures between a prompt and another, or between a seed and another, both ends included.

    As PNGs, each of which can be made again; or in one animated WebP, there and back, so that it has no jump.
    """

    def __init__(self, count: int | None, *, prompt: str | None, seed: int | None, animated: bool) -> None:
        self.count = FRAMES if count is None else count
        self.animated = animated
        if not 2 <= self.count <= MOST_FRAMES:
            raise InputError(f"--frames must be from 2 to {MOST_FRAMES}, got {self.count}")
        ends = {"mix_strength": prompt, "variation_strength": seed}
        self.ends = {strength: end for strength, end in ends.items() if end is not None}
        words = [*(["--interpolate", prompt] if prompt is not None else [])]
        words += [
            *(["--interpolate-seed", str(seed)] if seed is not None else []),
            "--frames",
            str(self.count),
        ]
        self.words = shlex.join(words)

    def fields(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        kept = {name: value for name, value in asked.items() if name not in self.ends}
        return kept | {IDLE[strength]: end for strength, end in self.ends.items()}

    def requests(
        self, build: Callable[..., Request], asked: Mapping[str, Any], one: Request
    ) -> list[Request]:
        # The first is the plain picture, also in what its file says.
        changes: list[dict[str, Any]] = [{IDLE[strength]: None for strength in self.ends}]
        changes += [dict.fromkeys(self.ends, number / (self.count - 1)) for number in range(1, self.count)]
        requests = [replace(one, **change) for change in changes]
        if self.animated:
            check_pixels(requests, "an animation")
        return requests

    def make(self, model: DiffusionModel, requests: Sequence[Request], output: Path) -> Iterator[Made]:
        from stable_diffusion.generation.metadata import save_png, save_webp

        if not self.animated:
            first, digits = place(output, requests[0], "-frame"), len(str(self.count))
            for number, request in enumerate(requests, start=1):
                frame = draw(model, request)
                path = first.with_stem(f"{first.stem}-{number:0{digits}}")
                path = save_png(frame.picture, path, frame.settings)
                yield Made(path=path, settings=frame.settings, seconds=frame.seconds, notes=frame.notes)
            return
        drawn = [draw(model, request) for request in requests]
        there = [each.picture for each in drawn]
        times = [REST_MS, *[FRAME_MS] * (self.count - 2), REST_MS, *[FRAME_MS] * (self.count - 2)]
        settings, (seconds, notes) = drawn[0].settings, joined(drawn)
        path = save_webp([*there, *there[-2:0:-1]], output, times, settings, sheet=self.words)
        yield Made(path=path, settings=settings, seconds=seconds, notes=notes, sheet=self.words)


class Progressive(Plain):
    """What the network sees in the noise at some of the steps, on one sheet, whose last picture is the finished one.

    Ho et al. 2020, figure 6.
    """

    words = "--progressive"

    def make(self, model: DiffusionModel, requests: Sequence[Request], output: Path) -> Iterator[Made]:
        from stable_diffusion.cli.sheet import sheet, wrapped
        from stable_diffusion.generation.metadata import save_png

        (request,) = requests
        labels: list[str] = []
        seen: list[Image.Image] = []

        def look(step: Step) -> None:
            cells = min(CELLS, step.total)
            last = step.total - 1
            if step.index in {round(cell * last / max(1, cells - 1)) for cell in range(cells)}:
                labels.append(f"step {step.index + 1} of {step.total}")
                if step.index < last:
                    seen.extend(model.decode(step.x0))

        drawn = draw(model, request, look)
        picture = sheet(wrapped(labels, [*seen, drawn.picture]))
        path = save_png(picture, place(output, request, "-steps"), drawn.settings, sheet=self.words)
        yield Made(
            path=path, settings=drawn.settings, seconds=drawn.seconds, notes=drawn.notes, sheet=self.words
        )
