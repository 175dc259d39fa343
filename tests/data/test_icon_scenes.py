"""Scenes of the icons: what captions say is what stands there, and what is held out never trains."""

from __future__ import annotations

import random
import re
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from stable_diffusion.data.icon_captions import STYLES, Thing
from stable_diffusion.data.icon_phrases import (
    held_out,
    is_plain,
    more_captions,
    plural,
    synonyms,
    with_adjectives,
)
from stable_diffusion.data.icon_plans import scenes
from stable_diffusion.data.icon_scenes import (
    COLOURS,
    POSITIONS,
    SCENE_SPLITS,
    Cast,
    Drawn,
    Part,
    Place,
    Scene,
    is_held,
)
from stable_diffusion.data.icon_sprites import ANCHORS, can_turn, compose, ground, turned
from stable_diffusion.images import to_rgb

NAMES = (
    *("fox", "drum", "cat", "teapot", "castle", "hot beverage", "pizza", "laptop", "apple", "car", "bicycle"),
    *("penguin", "skateboard", "top hat", "dog face", "cactus", "rocket", "violin", "robot", "sailboat"),
)


def thing(name: str) -> Thing:
    return Thing(code=name, object=name, article="a", role=name, group="objects", nameable=True)


@pytest.fixture(scope="module")
def cast() -> Cast:
    return Cast([Drawn(style, thing(name), style != "blob") for name in NAMES for style in STYLES])


@pytest.fixture(scope="module")
def planned(cast: Cast) -> list[Scene]:
    return list(scenes(cast, "train", 3000))


@pytest.mark.parametrize(
    ("one", "many"),
    [
        ("a fox", "foxes"),
        ("a cup of coffee", "cups of coffee"),
        ("a slice of pizza", "slices of pizza"),
        ("a leaf fluttering in wind", "leaves fluttering in wind"),
        ("a snowman", "snowmen"),
        ("a knife", "knives"),
        ("a computer mouse", "computer mice"),
        ("a cherry", "cherries"),
        ("a toy", "toys"),
        ("a person", "people"),
        ("a woman in a sari", "women in a sari"),
        ("a talisman", "talismans"),
        ("a sheep", "sheep"),
        ("a chef", "chefs"),
        ("a woman's hat", "woman's hats"),
    ],
)
def test_plurals(one: str, many: str) -> None:
    assert plural(one) == many


def test_adjectives_take_their_article_along() -> None:
    assert with_adjectives("an apple", "small", "red") == "a small red apple"
    assert with_adjectives("a fox", "orange") == "an orange fox"
    assert is_plain("a cup of coffee")
    assert not any(
        map(
            is_plain,
            ("grapes", "a red apple", "the sun", "a hammer and pick", "a boat that is being rowed by one"),
        )
    )


def test_held_out_names_are_never_taught() -> None:
    for name in ("fox", "hot beverage", "laptop", "castle"):
        assert not set(synonyms(name)) & set(held_out(name))
        taught = more_captions(thing(name), "noto")
        assert len(taught) == 3
        assert all(any(phrase in caption for phrase in synonyms(name)) for caption in taught)
    every = [
        len(held_out(name)) / (len(held_out(name)) + len(synonyms(name))) for name in NAMES if synonyms(name)
    ]
    assert 0.02 < np.mean(every) < 0.25


def test_training_shows_nothing_that_is_held_out(planned: list[Scene]) -> None:
    for scene in planned:
        objects = [part.object for part in scene.parts]
        assert not any(is_held("test_pair", a, b) for a, b in combinations(objects, 2))
        for part in scene.parts:
            assert part.colour is None or not is_held("test_colour", part.object, part.colour)
            assert len(part.places) == 1 or not is_held("test_count", part.object, str(len(part.places)))
        if scene.relation in POSITIONS:
            assert not is_held("test_position", scene.relation, *objects)
            turned_round = POSITIONS[POSITIONS.index(scene.relation) ^ 1]
            assert not is_held("test_position", turned_round, *objects[::-1])


@pytest.mark.parametrize("split", SCENE_SPLITS)
def test_a_test_split_holds_what_it_is_for(cast: Cast, split: str) -> None:
    for scene in scenes(cast, split, 40):
        a = scene.parts[0]
        assert scene.ground is None
        if split == "test_colour":
            assert a.colour is not None
            assert is_held("test_colour", a.object, a.colour)
        elif split == "test_count":
            assert not any("a few" in caption for caption in scene.captions)
            assert is_held("test_count", a.object, str(len(a.places)))
            assert 2 <= len(a.places) <= 4
        else:
            _, b = scene.parts
            assert is_held("test_pair", a.object, b.object)
            assert (a.colour != b.colour) == (split == "test_binding")
            if split == "test_position":
                assert is_held("test_position", scene.relation, a.object, b.object)


def test_every_kind_is_there_and_scenes_are_functions_of_their_number(
    cast: Cast, planned: list[Scene]
) -> None:
    kinds = Counter(scene.task for scene in planned)
    assert kinds.keys() == {"single", "colour", "counting", "two", "position", "binding", "many"}
    assert min(kinds.values()) > 100
    assert list(scenes(cast, "train", 20)) == planned[:20]
    grounds = sum(scene.ground is not None for scene in planned)
    assert 0.2 < grounds / len(planned) < 0.45
    assert {part.colour for scene in planned for part in scene.parts} == {None, *COLOURS}


def test_captions_say_what_is_there(planned: list[Scene]) -> None:
    numbers = {2: "two|2|a pair of|a couple of", 3: "three|3|a few", 4: "four|4|a few"}
    for scene in planned:
        assert 1 <= len(scene.captions) <= 3
        for caption in scene.captions:
            assert STYLES[scene.style].name in caption or STYLES[scene.style].look in caption
            bare = caption.replace(STYLES[scene.style].look, "")
            for part in scene.parts:
                if part.colour is not None:
                    assert re.search(part.colour.replace("grey", "gr[ea]y"), bare), caption
                if len(part.places) > 1:
                    assert re.search(rf"\b({numbers[len(part.places)]})\b", bare), caption
            if scene.ground is not None:
                assert re.search(f"(on|with)( an?)? {scene.ground.replace('grey', 'gr[ea]y')}", caption), (
                    caption
                )
            assert " a orange" not in caption


def test_places_are_where_the_caption_says(planned: list[Scene]) -> None:
    for scene in planned:
        boxes = [place for part in scene.parts for place in part.places]
        assert all(min(p.left, p.top) >= 0 and max(p.left, p.top) + p.side <= 1 for p in boxes), scene
        if scene.relation in POSITIONS:
            a, b = boxes
            dx, dy = a.left - b.left, a.top - b.top
            away = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}[scene.relation]
            assert away == 0.5, scene


def test_nearly_all_stand_on_the_grid_in_one_of_two_sizes(planned: list[Scene]) -> None:
    places = [place for scene in planned for part in scene.parts for place in part.places]
    grid = [p for p in places if p.side in (0.5, 1) and p.left % 0.125 == p.top % 0.125 == 0]
    assert len(grid) > 0.97 * len(places)


def sprite(colour: str = "orange") -> Image.Image:
    """A face of one colour with dark eyes and a white muzzle."""
    image = Image.new("RGBA", (64, 64))
    canvas = ImageDraw.Draw(image)
    canvas.ellipse((4, 8, 60, 56), fill=colour)
    canvas.ellipse((16, 20, 22, 26), fill="black")
    canvas.ellipse((42, 20, 48, 26), fill="black")
    canvas.ellipse((24, 36, 40, 50), fill="white")
    return image


@pytest.mark.parametrize("own", ["orange", "#3060d0", "#909090", "black", "#f0f0f0"])
@pytest.mark.parametrize("colour", COLOURS)
def test_a_turned_drawing_has_the_colour(own: str, colour: str) -> None:
    drawn = sprite(own)
    assert can_turn(drawn)
    pixels = np.asarray(turned(drawn, colour))
    assert (pixels[..., 3] == np.asarray(drawn)[..., 3]).all()
    skin = pixels[12:16, 28:36, :3].reshape(-1, 3).mean(0)
    nearest = min(ANCHORS, key=lambda name: float(np.abs(skin - ground_of(name)).sum()))
    assert nearest == colour
    if own == "orange" and colour != "black":
        assert pixels[23, 19, :3].max() < 60, "eyes stay dark"
        assert pixels[43, 32, :3].min() > 200, "what is white stays white"


def ground_of(colour: str) -> Any:
    """Pixels of the pure colour: a drawing of it, turned to it."""
    plain = Image.new("RGBA", (8, 8), "orange")
    return np.asarray(turned(plain, colour))[4, 4, :3].astype(float)


def test_a_composed_scene_has_its_things_in_their_boxes(
    cast: Cast, planned: list[Scene], tmp_path: Path
) -> None:
    sprite().save(tmp_path / "sprite.png")
    files = dict.fromkeys(NAMES, tmp_path / "sprite.png")
    for scene in random.Random(0).sample(planned, 60):
        picture, things = compose(scene, files, 128)
        clear, _ = compose(scene, files, 128, alpha=True)
        assert (picture.mode, clear.mode) == ("RGB", "RGB" if scene.ground else "RGBA")
        assert np.abs(np.subtract(to_rgb(clear), picture, dtype=int)).max() <= 2
        assert picture.size == (128, 128)
        assert [part.object for part, _ in things] == [p.object for p in scene.parts for _ in p.places]
        pixels = np.asarray(picture).astype(int)
        bare = (
            (np.abs(pixels - ground(scene.ground)).sum(-1) > 24) if scene.ground else (pixels.min(-1) < 240)
        )
        outside = bare.copy()
        for part, (left, top, width, height) in things:
            assert 0 <= left <= left + width <= 128
            assert 0 <= top <= top + height <= 128
            outside[top : top + height, left : left + width] = False
            if part.colour != "white":
                assert bare[top : top + height, left : left + width].mean() > 0.3
        assert not outside.any()


@pytest.mark.parametrize("colour", [None, "blue"])
def test_a_drawing_has_the_same_pixels_wherever_it_stands(colour: str | None, tmp_path: Path) -> None:
    sprite().save(tmp_path / "sprite.png")

    def drawn(place: Place) -> tuple[Any, Any]:
        part = Part(object="fox", places=(place,), colour=colour)
        scene = Scene(task="single", style="noto", parts=(part,), relation="next to")
        picture, ((_, box),) = compose(scene, {"fox": tmp_path / "sprite.png"}, 128)
        return np.asarray(picture), np.array(box)

    first, box = drawn(Place(0, 0, 0.5))
    for left, top in ((0.5, 0.25), (0.25, 0.5), (0.125, 0.375)):
        x, y = round(128 * left), round(128 * top)
        picture, moved = drawn(Place(left, top, 0.5))
        assert (picture[y : y + 64, x : x + 64] == first[:64, :64]).all()
        assert np.array_equal(moved - box, (x, y, 0, 0))


def test_what_is_upright_touches_an_edge_of_its_place(tmp_path: Path) -> None:
    sprite().save(tmp_path / "sprite.png")
    places = Place(0.25, 0, 0.5, 1.0), Place(0.25, 0.5, 0.5, 0.0)
    parts = tuple(Part(object="fox", places=(place,)) for place in places)
    scene = Scene(task="position", style="noto", parts=parts, relation="on top of")
    _, ((_, upper), (_, lower)) = compose(scene, {"fox": tmp_path / "sprite.png"}, 128)
    assert (upper[1] + upper[3], lower[1]) == (64, 64)
