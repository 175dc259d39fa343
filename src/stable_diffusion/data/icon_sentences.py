"""What captions say of a scene: several wordings, each exactly true."""

from __future__ import annotations

import random
from collections.abc import Iterator

from stable_diffusion.data.icon_captions import STYLES
from stable_diffusion.data.icon_phrases import phrase_of, plural, synonyms, with_adjectives
from stable_diffusion.data.icon_scenes import Cast, Part, Scene, one_of

_CAPTIONS = 3  # of each scene, where so many differ


def captions(cast: Cast, scene: Scene, lots: random.Random, *, exact: bool) -> Iterator[str]:
    """Up to three different captions of a scene, in other names and wordings; each says all that is special in it.

    Where they are `exact`, as prompts of a test must be, none says "a few".
    """
    seen: set[str] = set()
    for _ in range(_CAPTIONS):
        parts = [_named(cast, part, lots, exact) for part in scene.parts]
        if len(parts) == 1:
            (said,) = parts
        elif scene.relation == "next to" and len(parts) > 2:
            said = f"{', '.join(parts[:-1])} and {parts[-1]}"
        else:
            said = one_of(lots, _SAID[scene.relation]).format(**dict(zip("abc", parts, strict=False)))
        if scene.ground is not None:
            words = one_of(lots, _GROUNDS).format(_spelled(scene.ground, lots))
            said = f"{said} {words.replace(' a orange', ' an orange')}"
        style = STYLES[scene.style]
        caption = one_of(
            lots, (f"{said}, {style.name} style", f"{style.look} of {said}", f"{said} in {style.name} style")
        )
        if caption not in seen:
            seen.add(caption)
            yield caption


def _named(cast: Cast, part: Part, lots: random.Random, exact: bool) -> str:
    """The part as a noun phrase, in its own name or another one."""
    count = len(part.places)
    said = [] if part.size is None else [one_of(lots, _SIZES[part.size])]
    colour = None if part.colour is None else _spelled(part.colour, lots)
    own = phrase_of(cast.things[part.object])
    among = (
        [own, *synonyms(part.object)]
        if not said and colour is None and count == 1
        else cast.plain(part.object)
    )
    phrase = own if own in among and lots.random() < 0.5 else one_of(lots, among)
    if count > 1:
        number = one_of(lots, _NUMBERS[count])
        number = _NUMBERS[count][0] if exact and number == "a few" else number
        adjectives = [number, *said, *([colour] if colour else [])]
        return " ".join([*adjectives, plural(phrase)])
    if colour is not None and lots.random() < 0.15:
        return f"{with_adjectives(phrase, *said)} that is {colour}"
    adjectives = [*said, *([colour] if colour else [])]
    return with_adjectives(phrase, *adjectives) if adjectives else phrase


def _spelled(colour: str, lots: random.Random) -> str:
    return "gray" if colour == "grey" and lots.random() < 0.5 else colour


_SAID = {
    "next to": ("{a} and {b}",) * 4 + ("{a} with {b}", "{a} next to {b}", "{a} beside {b}"),
    "left of": (
        "{a} to the left of {b}",
        "{a} left of {b}",
        "{a} on the left of {b}",
        "{a} on the left and {b} on the right",
    ),
    "right of": (
        "{a} to the right of {b}",
        "{a} right of {b}",
        "{a} on the right of {b}",
        "{a} on the right and {b} on the left",
    ),
    "above": ("{a} above {b}", "{a} above {b}", "{a} over {b}", "{a} at the top and {b} at the bottom"),
    "below": ("{a} below {b}", "{a} under {b}", "{a} beneath {b}", "{a} at the bottom and {b} at the top"),
    "on top of": ("{a} on top of {b}", "{a} on {b}", "{a} sitting on {b}", "{a} standing on {b}"),
    "wearing": ("{b} wearing {a}", "{b} wearing {a}", "{b} with {a} on its head"),
    "between": ("{a} between {b} and {c}", "{a} in between {b} and {c}"),
}
_GROUNDS = ("on a {} background",) * 3 + ("on {}", "with a {} background")
_NUMBERS = {
    2: ("two",) * 8 + ("2", "a pair of", "a couple of"),
    3: ("three",) * 8 + ("3", "a few"),
    4: ("four",) * 8 + ("4", "a few"),
}
_SIZES = {"small": ("small", "small", "little", "tiny"), "big": ("big", "big", "large")}
