"""What training will see of a set of captioned images, found out before it begins: every picture is decoded."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

from PIL import Image

from stable_diffusion import images
from stable_diffusion.data.coco import CocoReport
from stable_diffusion.data.item import Files, Progress, Source, Split, ahead
from stable_diffusion.errors import InputError, shortened, three_of

_CAPTIONS_TOGETHER = 4096


@dataclass(frozen=True, kw_only=True)
class SplitReport:
    """What there is to a split; ``str`` gives lines to read. Sizes are of width and height, in pixels."""

    name: str
    found: CocoReport
    """What can be used, and what is left out; unreadable here is also what breaks off after its header."""
    distinct_captions: int
    captions_per_picture: tuple[int, int]
    """The fewest and the most."""
    cut_captions: tuple[tuple[str, str], ...]
    """Captions that are longer than the context, the one that loses most first, and what each of them loses."""
    context_length: int
    """Tokens that the text encoder reads, begin and end included."""
    sizes: tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
    """The smallest by area, the median and the largest."""
    training_size: int
    """Side of the square that training makes of each picture."""
    enlarged: tuple[str, ...]
    """Names of the pictures that have a side below that."""
    cropped: int
    """Pictures that are not square: training takes the square in their middle."""
    cropped_area: float
    """The part of their area that these lose, on average."""
    greyscale: int
    transparent: int
    several_frames: int
    equal: tuple[tuple[str, str], ...]
    """Names of pictures that have the pixels of an earlier one, and that one's name."""
    in_training: tuple[tuple[str, str], ...]
    """Names of pictures that training has too, pixel by pixel, and theirs there; empty for what training reads."""
    styles: dict[str, int]
    """Pictures of each style, by the field ``style``."""
    objects: int
    """Distinct values of the field ``object``; 0 where there are none."""

    def __str__(self) -> str:
        return "\n  ".join([f"{self.name}: {self.found}".replace("\n  ", "\n    "), *self._lines()])

    def _lines(self) -> list[str]:
        fewest, most = self.captions_per_picture
        each = str(most) if fewest == most else f"{fewest} to {most}"
        tokens = f"the {self.context_length} tokens that the text encoder reads"
        fit = "" if self.cut_captions else f", all within {tokens}"
        lines = [f"captions: {self.distinct_captions} distinct, {each} for each picture{fit}"]
        if self.cut_captions:
            text, lost = self.cut_captions[0]
            lines.append(
                f"captions longer than {tokens}: {len(self.cut_captions)};"
                f" the longest, {shortened(text, 120)!r}, loses {shortened(lost, 120)!r}"
            )
        smallest, median, largest = (f"{width}x{height}" for width, height in self.sizes)
        spread = f"smallest {smallest}, median {median}, largest {largest}"
        lines.append(f"sizes: {spread}" if smallest != largest else f"sizes: all {smallest}")
        if self.enlarged:
            number, names = len(self.enlarged), three_of(self.enlarged)
            lines.append(f"enlarged to {self.training_size} pixels: {number} ({names})")
        if self.cropped:
            lines.append(
                f"cropped to a square: {self.cropped}, which lose {self.cropped_area:.0%} of their area on average"
            )
        for what, count in (
            ("greyscale", self.greyscale),
            ("transparent, laid on white", self.transparent),
            ("of several frames, of which the first counts", self.several_frames),
        ):
            if count:
                lines.append(f"{what}: {count}")
        for what, pairs in (("equal to another picture", self.equal), ("also in training", self.in_training)):
            if pairs:
                lines.append(f"{what}: {len(pairs)} ({three_of([' = '.join(pair) for pair in pairs])})")
        if self.styles:
            lines.append("styles: " + ", ".join(f"{style} {count}" for style, count in self.styles.items()))
        if self.objects:
            lines.append(f"objects: {self.objects}")
        return lines


def check_set(
    splits: Sequence[Split],
    *,
    size: int,
    cut: Callable[[list[str]], list[str]],
    context_length: int,
) -> Generator[Progress, None, tuple[SplitReport, ...]]:
    """Reads every caption and decodes every picture; the splits' reports are what the generator returns.

    Args:
        splits: those that training reads come first.
        size: side of the squares that training will make of the pictures, in pixels.
        cut: gives the end of each text that the text encoder does not read, empty where it reads all.
        context_length: tokens that it reads, begin and end included.

    Raises:
        InputError: a split has no picture that can be decoded, or the size is below 1.
    """
    if size < 1:
        raise InputError(f"the size in training must be at least 1 pixel, got {size}")
    trained: dict[bytes, str] = {}
    reports = []
    for split in splits:
        report, digests = yield from _check(split, size, cut, context_length, trained)
        reports.append(report)
        if split.is_training:
            trained |= digests
    return tuple(reports)


def _check(
    split: Split,
    size: int,
    cut: Callable[[list[str]], list[str]],
    context_length: int,
    trained: dict[bytes, str],
) -> Generator[Progress, None, tuple[SplitReport, dict[bytes, str]]]:
    """A split's report, and by the digest of their pixels its pictures' names."""
    looks = yield from _decode(split)
    entries = [entry for entry in split.entries if entry.key in looks]
    counts = [len(entry.captions) for entry in entries]
    distinct = sorted({text for entry in entries for text in entry.captions})
    lost = yield from _lost(split, distinct, cut)
    damaged = {entry.key for entry in split.entries} - looks.keys()
    found = getattr(split.source, "report", None) or CocoReport(pictures=0, captions=0)
    styles, objects = (
        [value for entry in entries if isinstance(value := entry.fields.get(name), str)]
        for name in ("style", "object")
    )
    digests: dict[bytes, str] = {}
    equal, in_training = [], []
    for name, look in looks.items():
        first = digests.setdefault(look.digest, name)
        if first != name:
            equal.append((name, first))
        if look.digest in trained and not split.is_training:
            in_training.append((name, trained[look.digest]))
    sizes = sorted((look.size for look in looks.values()), key=lambda side: (side[0] * side[1], side))
    kept = [min(side) / max(side) for side in sizes if side[0] != side[1]]
    report = SplitReport(
        name=split.name,
        found=replace(
            found,
            pictures=len(looks),
            captions=sum(counts),
            unreadable=tuple(sorted({*found.unreadable, *damaged})),
        ),
        distinct_captions=len(distinct),
        captions_per_picture=(min(counts), max(counts)),
        cut_captions=tuple(sorted(lost.items(), key=lambda pair: (-len(pair[1]), pair[0]))),
        context_length=context_length,
        sizes=(sizes[0], sizes[len(sizes) // 2], sizes[-1]),
        training_size=size,
        enlarged=tuple(name for name, look in looks.items() if min(look.size) < size),
        cropped=len(kept),
        cropped_area=1 - sum(kept) / len(kept) if kept else 0.0,
        greyscale=sum(look.greyscale for look in looks.values()),
        transparent=sum(look.transparent for look in looks.values()),
        several_frames=sum(look.several_frames for look in looks.values()),
        equal=tuple(equal),
        in_training=tuple(in_training),
        styles=dict(Counter(styles)),
        objects=len(set(objects)),
    )
    return report, digests


def _decode(split: Split) -> Generator[Progress, None, dict[str, _Look]]:
    """What each picture is, by key; without those that cannot be decoded."""
    looks: dict[str, _Look] = {}
    keys = [entry.key for entry in split.entries]
    for done, look in enumerate(ahead(partial(_look, split.source), keys)):
        yield Progress(f"{split.name}: pictures", done, len(keys))
        if look is not None:
            looks[keys[done]] = look
    yield Progress(f"{split.name}: pictures", len(keys), len(keys))
    if not looks:
        raise InputError(f"none of the pictures in {split.name!r} can be decoded: fetch them again")
    return looks


def _lost(
    split: Split, texts: Sequence[str], cut: Callable[[list[str]], list[str]]
) -> Generator[Progress, None, dict[str, str]]:
    """The texts that are cut, and what each of them loses."""
    lost: dict[str, str] = {}
    for start in range(0, len(texts), _CAPTIONS_TOGETHER):
        some = list(texts[start : start + _CAPTIONS_TOGETHER])
        lost |= {text: end for text, end in zip(some, cut(some), strict=True) if end}
        yield Progress(f"{split.name}: captions", start + len(some), len(texts))
    return lost


class _Look(NamedTuple):
    """What one picture is."""

    size: tuple[int, int]
    greyscale: bool
    transparent: bool
    several_frames: bool
    digest: bytes
    """Of its size and of its pixels as training sees them."""


def _look(source: Source, key: str) -> _Look | None:
    """None for what is not a picture, or a broken one. Only files tell more than what training sees."""
    try:
        if isinstance(source, Files):
            with source.opened(key) as image:
                greyscale = image.mode in ("1", "L", "LA", "I", "I;16")
                transparent = image.has_transparency_data
                several_frames = bool(getattr(image, "is_animated", False))
                picture = images.decoded(image)
                return _Look(picture.size, greyscale, transparent, several_frames, _digest(picture))
        picture = source.image(key)
    except InputError:
        return None
    return _Look(picture.size, False, False, False, _digest(picture))


def _digest(picture: Image.Image) -> bytes:
    hasher = hashlib.sha256(repr(picture.size).encode())
    hasher.update(picture.tobytes())
    return hasher.digest()
