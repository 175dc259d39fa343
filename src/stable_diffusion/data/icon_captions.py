"""What the drawings of the set of icons are called: styles, things, and the captions made of both.

Names, keywords, groups, skin tones and genders come from emojibase's data.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from dataclasses import dataclass, replace
from typing import Any, NamedTuple


class Style(NamedTuple):
    """How one vendor draws."""

    name: str
    """In captions: "a fox, {name} style"."""
    look: str
    """In captions: "{look} of a fox"."""
    family: str
    """Styles of one family are sisters: they share many drawings, or began with the same ones."""


STYLES: dict[str, Style] = {
    "fluent3d": Style("fluent 3d", "a 3d render", "fluent"),
    "flat": Style("fluent flat", "a flat color illustration", "fluent"),
    "contrast": Style("high contrast", "a black and white pictogram", "fluent"),
    "noto": Style("noto", "a smooth shaded cartoon", "noto"),
    "blob": Style("blob", "a blobby cartoon", "noto"),
    "twemoji": Style("twemoji", "a simple flat cartoon", "twemoji"),
    "emojione": Style("emojione", "a clean vector cartoon", "emojione"),
    "mono": Style("line icon", "a black line drawing", "emojione"),
}

TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
"""Skin tones, in the order of the code points U+1F3FB to U+1F3FF."""

GENDERS = ("man", "woman")


@dataclass(frozen=True, kw_only=True)
class Thing:
    """What one code point, or one sequence of them, stands for."""

    code: str
    """Its code points, as ``plain_code`` writes them."""
    object: str
    """Its name without skin tone and article: "fox", "man with red hair"."""
    article: str
    """What the object needs before it in a sentence: "a", "an", "the", or nothing."""
    role: str
    """The object without its gender, "student" for "woman student"; the object itself where it has none."""
    group: str
    """One of emojibase's, such as "animals-nature"."""
    nameable: bool
    """False for people, flags, letters and numbers: no description leads from other things to them."""
    tone: str | None = None
    """One of ``TONES``; None is a drawing in no human skin colour."""
    gender: str | None = None
    """One of ``GENDERS``."""
    keywords: tuple[str, ...] = ()
    order: int = 0
    """Place among all things, those that are emoji for longer first."""


def chance(*names: str) -> float:
    """A number in [0, 1) that looks drawn by lot and depends on the names alone: the same on every machine."""
    digest = hashlib.sha256("\n".join(names).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def plain_code(code: str) -> str:
    """Code points as one spelling of the several that packages use: no U+FE0F, no leading zeros, lower case."""
    points = [point.lstrip("0") for point in re.split("[-_]", code.lower())]
    return "-".join(point for point in points if point != "fe0f")


def slug(text: str) -> str:
    """Letters a to z, digits and single hyphens, as the icon packages spell names."""
    letters = unicodedata.normalize("NFKD", re.sub("['’“”]", "", text)).encode("ascii", "ignore").decode()
    return re.sub("[^a-z0-9]+", "-", letters.lower()).strip("-")


def read_things(data: list[dict[str, Any]], groups: dict[str, Any]) -> dict[str, Thing]:
    """The things in emojibase's ``data.json`` by code.

    People of two different skin tones are left out, and skin colours and hair that stand alone (the group
    "component").

    Args:
        data: ``en/data.json``.
        groups: ``meta/groups.json``, the names of groups and subgroups.
    """
    entries = {plain_code(entry["hexcode"]): entry for entry in data}
    ages = sorted(entries, key=lambda code: (entries[code]["version"], entries[code].get("order", 0), code))
    order = {code: number for number, code in enumerate(ages)}
    things: dict[str, Thing] = {}
    for code, entry in entries.items():
        group = groups["groups"].get(str(entry.get("group")), "symbols")  # letters have none
        if group == "component":
            continue
        subgroup = groups["subgroups"].get(str(entry.get("subgroup")), "letter")
        article, noun = _noun(entry["label"], subgroup)
        gender, neutral = _gender(code)
        if neutral not in entries:  # such as a family of man and boy
            gender, neutral = None, code
        base = Thing(
            code=code,
            object=noun,
            article=article,
            role=_noun(entries[neutral]["label"], subgroup)[1],
            group=group,
            nameable=group not in ("people-body", "flags") and subgroup not in _CHARACTERS,
            gender=gender,
            keywords=tuple(tag for tag in entry.get("tags", ()) if tag.lower() != noun.lower()),
            order=order[code],
        )
        things[code] = base
        for skin in entry.get("skins", ()):
            if isinstance(skin["tone"], list):
                continue
            key = plain_code(skin["hexcode"])
            things[key] = replace(base, code=key, tone=TONES[skin["tone"] - 1])
    return things


def slugs(data: list[dict[str, Any]]) -> dict[str, str]:
    """Codes by the slug of emojibase's name, skin tones included."""
    entries = [*data, *(skin for entry in data for skin in entry.get("skins", ()))]
    return {slug(entry["label"]): plain_code(entry["hexcode"]) for entry in reversed(entries)}


def style_words(style: str) -> tuple[str, str]:
    """The words that name a style in captions, of which each has one."""
    return f"{STYLES[style].name} style", STYLES[style].look


def captions(thing: Thing, style: str) -> list[str]:
    """Three or four different captions of one drawing. All of them say the style: without it, half is left to guess.

    >>> captions(fox, "noto")
    ['a fox, noto style', 'a smooth shaded cartoon of a fox', 'fox in noto style', 'fox, animal, face, noto style']
    """
    noun = thing.object
    if thing.tone is not None:
        joint = "and" if " with " in noun and " between " not in noun else "with"
        noun = f"{noun} {joint} {thing.tone} skin"
    phrase = f"{thing.article} {noun}".lstrip()
    words = sorted(thing.keywords, key=lambda word: chance("keyword", style, thing.code, word))[:3]
    name, look = style_words(style)
    made = [f"{phrase}, {name}", f"{look} of {phrase}", f"{noun} in {name}"]
    if words:
        made.append(f"{noun}, {', '.join(words)}, {name}")
    return made


def _gender(code: str) -> tuple[str | None, str]:
    """The gender that the code points tell, and the code of the same without one (which need not exist)."""
    points = code.split("-")
    for gender, sign, person, other in (
        ("man", "2642", "1f468", "1f469"),
        ("woman", "2640", "1f469", "1f468"),
    ):
        if points[-2:] == ["200d", sign]:
            return gender, "-".join(points[:-2])
        if person in points and other not in points and points.count(person) == 1:
            return gender, "-".join("1f9d1" if point == person else point for point in points)
    return None, code


def _noun(label: str, subgroup: str) -> tuple[str, str]:
    """The article and the noun of one of emojibase's names, which are not English phrases yet."""
    label = re.sub(r" \(.*\)", "", re.sub("[“”]", "", label).replace("’", "'").replace(" & ", " and "))
    head, _, rest = label.partition(": ")
    if head == "flag":
        return "the", f"flag of {rest}"
    if head == "keycap":
        return "a", f"keycap {rest}"
    if rest:
        label = _joined(head, rest)
    label = re.sub("^(un)?locked", r"\1locked padlock", label)
    if label.startswith("regional indicator "):
        return "the", f"letter {label.removeprefix('regional indicator ')}"
    if subgroup == "time" and label.endswith(("o'clock", "-thirty")):
        return "a", f"clock at {label}"
    ending = _ENDINGS.get(subgroup, "")
    if label in _SIGNS:
        ending = "sign"
    if ending and label.split()[-1] not in ("sign", "symbol"):
        label = f"{label} {ending}"
    return _article(label), label


def _joined(head: str, rest: str) -> str:
    parts = rest.split(", ")
    several = " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
    if head == "family":
        return f"family of {several}"
    if head in ("kiss", "couple with heart"):
        return f"{head} between {several}"
    if rest == "bald":
        return f"bald {head}"
    return f"{head} {rest}" if rest.startswith("facing ") else f"{head} with {rest}"


def _article(noun: str) -> str:
    if noun in _BARE or noun.split()[0] in _BARE_FIRST:
        return ""
    if noun in _UNIQUE:
        return "the"
    head = _HEAD.split(noun)[0].split()
    singular = head[0] in _PERSON or head[-1].endswith(("ss", "us", "is", "ros", "'s")) or head[-1] == "SOS"
    if head[-1].endswith("s") and not singular:
        return ""
    if _AS_VOWEL.match(noun):
        return "an"
    return "an" if noun[0].lower() in "aeiou" and not _AS_CONSONANT.match(noun) else "a"


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split(", "))


_CHARACTERS = ("letter", "alphanum", "keycap")  # subgroups
_ENDINGS = {"transport-sign": "sign", "warning": "sign", "math": "sign", "zodiac": "zodiac sign"}
_SIGNS = _names(
    "cinema, wireless, vibration mode, mobile phone off, information, copyright, registered, trade "
    "mark, construction, currency exchange, high voltage, input latin uppercase, input latin lowercase, "
    "input latin letters, input numbers, input symbols"
)
_HEAD = re.compile(
    r" (?:with|without|in|on|of|at|behind|between|showing|facing|holding|not|over|fluttering)\b|,"
)
_PERSON = {"person", "man", "woman", "deaf", "pregnant", "older"}
_BARE_FIRST = {"people", "men", "women", "two", "hundred"}
_UNIQUE = {"Statue of Liberty", "milky way", "kaaba", "sun"}
_AS_VOWEL = re.compile(r"(?:hourglass|SOS|NG|x-ray|8)\b", re.IGNORECASE)
_AS_CONSONANT = re.compile(r"(?:uni|eu|ewe|one\b|U-)", re.IGNORECASE)
_BARE = _names(
    "bread, baguette bread, bacon, broccoli, butter, canned food, cooked rice, curry rice, falafel, "
    "fondue, garlic, ginger root, ice, ice cream, shaved ice, soft ice cream, mate, meat on bone, oden, "
    "popcorn, sake, salt, spaghetti, sushi, bubble tea, custard, coral, cooking, wood, fire, fog, "
    "foggy, soap, yarn, thread, dna, tennis, bowling, ice hockey, field hockey, lacrosse, ping pong, "
    "badminton, horse racing, performing arts, camping, building construction, breast-feeding, nail "
    "polish, Santa Claus, Mrs. Claus, Mx Claus, mount fuji, palms up together, rolling on the floor "
    "laughing, dashing away, dizzy, luggage, money with wings, om, pouring liquid, skis, ZZZ"
)
