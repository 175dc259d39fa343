"""Noun phrases for the things of the icons: as people say them, with adjectives, and several of a kind."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from stable_diffusion.data.icon_captions import Thing, chance, style_words

HELD_OUT = 0.1  # of the phrases, by a stable hash: they test whether words are understood that nobody taught
WORDS_RULE = "drawings for training, by names that training never sees: 10 % of those in icon_names.tsv"
_NAMES = Path(__file__).with_name("icon_names.tsv")
_ARTICLE = re.compile(r"^(an?|the|some) ", re.IGNORECASE)


@cache
def synonyms(name: str) -> tuple[str, ...]:
    """Phrases that mean the object of this name, for training: those of ``icon_names.tsv`` that are not held out.

    Empty for an object that the file lacks.
    """
    return tuple(phrase for phrase in _names().get(name, ()) if not _is_held_out(phrase))


@cache
def held_out(name: str) -> tuple[str, ...]:
    """The object's phrases that training never sees."""
    return tuple(phrase for phrase in _names().get(name, ()) if _is_held_out(phrase))


def more_captions(thing: Thing, style: str, *, others: bool = False) -> list[str]:
    """Up to three captions of a drawing in other words for its object; `others` takes those that are held out.

    Each style has others of them, so that training meets all.
    """
    phrases = (held_out if others else synonyms)(thing.object)
    skin = "" if thing.tone is None else f" with {thing.tone} skin"
    name, look = style_words(style)
    chosen = sorted(phrases, key=lambda phrase: chance("synonym", style, thing.code, phrase))[:3]
    return [
        f"{look} of {phrase}{skin}" if i % 2 else f"{phrase}{skin}, {name}" for i, phrase in enumerate(chosen)
    ]


def phrase_of(thing: Thing) -> str:
    """The object's own name with its article: "a fox", "grapes"."""
    return f"{thing.article} {thing.object}".lstrip()


def is_plain(phrase: str) -> bool:
    """Whether it is short, says one of a countable thing and no colour: what adjectives and a plural suit."""
    words = phrase.split(" ")
    singular = (
        words[0] in ("a", "an") and len(words) <= 5 and not (len(words) > 2 and words[-1].endswith("ing"))
    )
    return singular and not any(word in _NOT_PLAIN for word in words)


def with_adjectives(phrase: str, *adjectives: str) -> str:
    """The phrase with the adjectives in front of its noun: "an apple", "small", "red" is "a small red apple"."""
    return indefinite(" ".join([*adjectives, _ARTICLE.sub("", phrase)]))


def indefinite(noun: str) -> str:
    """The noun, or what stands before it, after "a" or "an"."""
    return f"{'an' if _VOWEL.match(noun) else 'a'} {noun}"


def plural(phrase: str) -> str:
    """Several of what the phrase is one of, without an article: "a cup of coffee" is "cups of coffee"."""
    noun = _ARTICLE.sub("", phrase)
    head = _TAIL.split(noun, maxsplit=1)[0]
    *before, last = head.split(" ")
    return " ".join([*before, _plural_word(last)]) + noun[len(head) :]


def _plural_word(word: str) -> str:
    lower = word.lower()
    for ending, many in _IRREGULAR.items():
        if lower == ending or (lower.endswith(ending) and len(ending) > 3):
            return word[: len(word) - len(ending)] + many
    if lower.endswith("man") and lower not in _NO_MEN:
        return f"{word[:-2]}en"
    if lower.endswith(("s", "x", "z", "ch", "sh")):
        return f"{word}es"
    if lower.endswith("y") and lower[-2:-1] not in "aeiou":
        return f"{word[:-1]}ies"
    return f"{word}s"


@cache
def _names() -> dict[str, tuple[str, ...]]:
    rows = (line.split("\t") for line in _NAMES.read_text(encoding="utf-8").splitlines())
    return {name: tuple(phrases.split(" | ")) for name, phrases in rows}


def _is_held_out(phrase: str) -> bool:
    return chance("test_words", phrase) < HELD_OUT


_NOT_PLAIN = frozenset(
    (
        *(
            "red",
            "orange",
            "yellow",
            "green",
            "blue",
            "purple",
            "violet",
            "pink",
            "brown",
            "black",
            "white",
            "grey",
        ),
        *(
            "gray",
            "gold",
            "golden",
            "silver",
            "colored",
            "coloured",
            "small",
            "big",
            "little",
            "large",
            "tiny",
        ),
        *("two", "three", "four", "pair", "who", "or", "and"),
    )
)
_VOWEL = re.compile(r"[aeio]|u(?!ni|ku|se)|hour|SOS|NG|x-ray|8", re.IGNORECASE)
_TAIL = re.compile(
    r"(?= (?:of|with|without|in|on|at|for|to|from|by|behind|between|showing|facing|holding|over|under|that|which|and|"
    r"full|made|using|wearing|going|flying|taking|standing|sitting|lying|seen|tilted|turned|pointed|pointing|"
    r"curving|screaming|vomiting|blowing|savoring|exhaling|shaking|fluttering)\b|,)"
)
_NO_MEN = ("human", "german", "roman", "ottoman", "talisman", "shaman")
_IRREGULAR = {
    "mouse": "mice",
    "person": "people",
    "elf": "elves",
    "foot": "feet",
    "tooth": "teeth",
    "goose": "geese",
    "ox": "oxen",
    "child": "children",
    "leaf": "leaves",
    "loaf": "loaves",
    "wolf": "wolves",
    "knife": "knives",
    "scarf": "scarves",
    "calf": "calves",
    "half": "halves",
    "shelf": "shelves",
    "thief": "thieves",
    "tomato": "tomatoes",
    "potato": "potatoes",
    "mango": "mangoes",
    "hero": "heroes",
    "volcano": "volcanoes",
    "buffalo": "buffaloes",
    "mosquito": "mosquitoes",
    "domino": "dominoes",
    "cactus": "cacti",
    "sheep": "sheep",
    "deer": "deer",
    "fish": "fish",
    "shrimp": "shrimp",
    "squid": "squid",
    "moose": "moose",
    "bison": "bison",
    "aircraft": "aircraft",
    "spacecraft": "spacecraft",
    "quiz": "quizzes",
    "die": "dice",
}
