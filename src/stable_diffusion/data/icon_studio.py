"""The scenes of the set of icons as files: large drawings, composed pictures, captions and what is where."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from stable_diffusion.data.icon_captions import Thing, style_words
from stable_diffusion.data.icon_packages import draw
from stable_diffusion.data.icon_plans import scenes
from stable_diffusion.data.icon_scenes import SCENE_SPLITS, Cast, Drawn, Scene
from stable_diffusion.data.icon_sprites import Box, can_turn, compose
from stable_diffusion.data.item import Progress, ahead
from stable_diffusion.data.made import Captioned, write_captions

TRAINING = "train_scenes"
TEST_SCENES = 500
"""Most scenes of a split that tests."""
SHARE = 0.7
"""Of what training samples, the part that scenes are."""

RULES = {TRAINING: "scenes that show nothing of what the other splits of scenes hold", **SCENE_SPLITS}
"""The splits of scenes and what they hold."""

Source = tuple[str, Thing, str | bytes]
"""A style, a thing, and its drawing: SVG, or a file's bytes."""


def numbers(count: int) -> dict[str, int]:
    """How many scenes each split has, with so many for training."""
    return {TRAINING: count, **dict.fromkeys(SCENE_SPLITS, min(count, TEST_SCENES))}


def write_scenes(
    out: Path,
    workshop: Path,
    sources: Sequence[Source],
    count: int,
    size: int,
    weight: float,
    info: dict[str, Any],
) -> Iterator[Progress]:
    """Writes the splits of scenes, as it is consumed.

    Args:
        out: the set's folder.
        workshop: a folder for drawings on the way.
        sources: the drawings for training.
        count: scenes for training.
        size: side of the pictures.
        weight: the sum of the weights of all other training pictures.
        info: of the captions' files.
    """
    threads, files, cast = os.cpu_count() or 1, dict[tuple[str, str], Path](), list[Drawn]()
    workshop.mkdir()

    def drawn_large(numbered: tuple[int, Source]) -> tuple[Drawn, Path]:
        number, (style, thing, source) = numbered
        drawing, path = draw(source, 2 * size), workshop / f"{number}.png"
        drawing.save(path, "PNG", compress_level=1)
        return Drawn(style, thing, can_turn(drawing)), path

    plain = [source for source in sources if source[1].tone is None]
    for done, (drawn, path) in enumerate(ahead(drawn_large, enumerate(plain), threads)):
        if done % 50 == 0:
            yield Progress("drawing for scenes", done, len(plain))
        cast.append(drawn)
        files.setdefault((drawn.style, drawn.thing.object), path)
    yield Progress("drawing for scenes", len(plain), len(plain))

    players = Cast(cast)
    total, done = sum(numbers(count).values()), 0
    each = SHARE / (1 - SHARE) * weight / max(1, count)
    for split, number in numbers(count).items():
        (out / split).mkdir()
        pictures: Captioned = []

        def render(scene: Scene) -> tuple[Scene, bytes, list[dict[str, Any]]]:
            own = {part.object: files[scene.style, part.object] for part in scene.parts}
            image, things = compose(scene, own, size, alpha="alpha" in info)
            png = io.BytesIO()
            image.save(png, "PNG", compress_level=6)
            return scene, png.getvalue(), [_thing(part.object, part.colour, box) for part, box in things]

        planned = scenes(players, "train" if split == TRAINING else split, number)
        for i, (scene, image, things) in enumerate(ahead(render, planned, threads)):
            name = f"{scene.task}-{i:06}.png"
            (out / split / name).write_bytes(image)
            pictures.append((_image(scene, i, name, size, things, each), list(scene.captions)))
            done += 1
            if done % 50 == 0:
                yield Progress("composing", done, total)
        write_captions(out, split, info | {"split": split, "rule": RULES[split]}, pictures)
    yield Progress("composing", total, total)


def _image(
    scene: Scene, number: int, name: str, size: int, things: list[dict[str, Any]], weight: float
) -> dict[str, Any]:
    """What a captions file says of a scene."""
    return {
        "id": number,
        "file_name": name,
        "width": size,
        "height": size,
        "task": scene.task,
        "style": scene.style,
        "style_words": list(style_words(scene.style)),
        "relation": scene.relation,
        "ground": scene.ground or "white",
        "things": things,
        "weight": round(weight, 6),
    }


def _thing(name: str, colour: str | None, box: Box) -> dict[str, Any]:
    return {"object": name, "colour": colour, "box": list(box)}
