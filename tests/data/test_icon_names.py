"""Other ways to ask for the objects of the icons, written for this project."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from stable_diffusion.data import icons

FILE = Path(icons.__file__).with_name("icon_names.tsv")
NAMES = {
    name: phrases.split(" | ")
    for name, phrases in (line.split("\t") for line in FILE.read_text(encoding="utf-8").splitlines())
}


def bare(phrase: str) -> str:
    return re.sub(r"^(a|an|the|some) ", "", phrase.lower())


def test_each_object_has_several() -> None:
    assert len(NAMES) == 1940
    assert all(3 <= len(phrases) <= 12 for phrases in NAMES.values())
    assert all(0 < len(phrase) <= 60 and phrase == phrase.strip() for one in NAMES.values() for phrase in one)


def test_none_would_fit_another_object() -> None:
    counts = Counter(bare(phrase) for phrases in NAMES.values() for phrase in phrases)
    assert [phrase for phrase, count in counts.items() if count > 1] == []
    assert counts.keys() & {name.lower() for name in NAMES} == set()
