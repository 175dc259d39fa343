"""Which drawings of the set of icons are held out, decided by names before any model exists."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from stable_diffusion.data.icon_captions import GENDERS, STYLES, Thing, chance

SPLITS: dict[str, str] = {
    "train": "all that is not held out",
    "val": "2 % of the pictures that no other split holds, by style and code points: for the loss curve",
    "test_style": (
        "11 % of the pairs of object and style, in every skin tone, as long as training knows the object in at "
        "least three other styles"
    ),
    "test_tone": "8 % of the pairs of object and skin tone, in every style",
    "test_gender": "for 25 % of the roles that are drawn as man and as woman, one of the two, in every style and tone",
    "test_object": (
        "3 % of the objects, in every style; no people, flags, letters or numbers: only the words lead to them"
    ),
}
"""The splits and their rules. A picture that several rules hold belongs to the last of them in this table."""

HASH_RULE = (
    "A name is held out if the first 48 bits of the SHA-256 of its parts, joined by line feeds in UTF-8, read as a "
    "number in [0, 1), are below the rate. The parts: val, style, code; test_style, object, style; test_tone, "
    "object, tone; test_gender, role (and test_gender, role, woman below 0.5 holds out the woman, otherwise the man); "
    "test_object, object. A person facing right counts as the same person facing left."
)

PARTED = "test_style"
"""The split that is scored in two parts: a model can copy a drawing whose sister training holds."""

_RATES = {"val": 0.02, "test_style": 0.11, "test_tone": 0.08, "test_gender": 0.25, "test_object": 0.03}
_KNOWN = 3  # other styles of an object that training must keep


def split_pictures(pictures: Sequence[tuple[str, Thing]]) -> list[str]:
    """The split of each picture (style, thing); the order of the pictures makes no difference."""
    genders: dict[str, set[str | None]] = defaultdict(set)
    for _, thing in pictures:
        genders[thing.role].add(thing.gender)
    splits = [_by_name(style, thing, genders[thing.role]) for style, thing in pictures]

    known = _styles(pictures, splits, "train")
    held = set()
    for name, styles in _styles(pictures, splits, "train", "val").items():
        for style in sorted(styles, key=lambda style: (chance("test_style", name, style), style)):
            if _drawn("test_style", name, style) and len(known[name] - {style}) >= _KNOWN:
                known[name].discard(style)
                held.add((name, style))
    return [
        "test_style" if split in ("train", "val") and (_turned(thing.object), style) in held else split
        for (style, thing), split in zip(pictures, splits, strict=True)
    ]


def sisters(pictures: Sequence[tuple[str, Thing]], splits: Sequence[str]) -> list[bool]:
    """Whether training holds the picture's object in another style of the same family."""
    known = _styles(pictures, splits, "train")
    return [
        any(STYLES[other].family == STYLES[style].family for other in known[_turned(thing.object)] - {style})
        for style, thing in pictures
    ]


def _styles(
    pictures: Sequence[tuple[str, Thing]], splits: Sequence[str], *among: str
) -> defaultdict[str, set[str]]:
    """The styles of each object in these splits."""
    found = defaultdict[str, set[str]](set)
    for (style, thing), split in zip(pictures, splits, strict=True):
        if split in among:
            found[_turned(thing.object)].add(style)
    return found


def _by_name(style: str, thing: Thing, genders: set[str | None]) -> str:
    """The split by all rules but that of object and style, which needs to know what training keeps."""
    if thing.nameable and _drawn("test_object", thing.object):
        return "test_object"
    if (
        thing.gender is not None
        and genders.issuperset(GENDERS)
        and _drawn("test_gender", _turned(thing.role))
    ):
        held = "woman" if chance("test_gender", _turned(thing.role), "woman") < 0.5 else "man"
        if thing.gender == held:
            return "test_gender"
    if thing.tone is not None and _drawn("test_tone", _turned(thing.object), thing.tone):
        return "test_tone"
    return "val" if _drawn("val", style, thing.code) else "train"


def _turned(name: str) -> str:
    """Vendors mirror people who face left, so what is held out of one must be held out of both."""
    return name.removesuffix(" facing right")


def _drawn(split: str, *names: str) -> bool:
    return chance(split, *names) < _RATES[split]
