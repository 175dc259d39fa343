"""What a set of captioned images is to everything that reads one."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

from PIL import Image

from stable_diffusion.errors import InputError

THREADS = 8  # that decode: PIL does it outside Python's lock


@dataclass(frozen=True, kw_only=True)
class Entry:
    """An item without its picture."""

    key: str
    """Unique in the set, such as a file's name: for messages, splits and caches."""
    captions: tuple[str, ...]
    """At least one; each without surrounding space, none empty."""
    weight: float = 1.0
    """How often training samples the item, relative to the others; above 0."""
    fields: Mapping[str, object] = field(default_factory=dict)
    """What else the set says of it, such as ``object``, ``style`` and ``split``."""
    version: str = ""
    """Another text whenever the picture is another one: what caches depend on."""


@dataclass(frozen=True, kw_only=True)
class Item(Entry):
    """One picture and what is said of it."""

    image: Image.Image
    """RGB, upright, of any size."""


class Source(Protocol):
    """A set of captioned images in a fixed order. Members can be pickled, for spawned workers."""

    def entries(self) -> Sequence[Entry]:
        """All of them in their order, without decoding a picture."""
        ...

    def image(self, key: str) -> Image.Image:
        """The picture of an entry. Raises InputError if it cannot be decoded."""
        ...


def stream(source: Source, keys: Iterable[str], threads: int = THREADS) -> Iterator[Image.Image | InputError]:
    """The pictures of these keys in their order, decoded on threads a little ahead; the error of a damaged one.

    A source that reads its pictures best one after the other has a ``stream`` of its own, which is taken then.
    """
    if (own := getattr(source, "stream", None)) is not None:
        yield from own(keys)
        return
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[Image.Image | InputError]] = deque()
        try:
            for key in keys:
                waiting.append(pool.submit(_decoded, source, key))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _decoded(source: Source, key: str) -> Image.Image | InputError:
    try:
        return source.image(key)
    except InputError as error:
        return error


class Progress(NamedTuple):
    """How far work on a set has come."""

    what: str
    """What is being done, such as "drawing"."""
    done: int
    total: int


class CaptionedImages(Source, Protocol):
    """The older reading of a set; goes as the rooms that use it are rebuilt."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Item: ...
    def captions(self, index: int) -> tuple[str, ...]: ...
    def weight(self, index: int) -> float: ...
    def name(self, index: int) -> str: ...
    def path(self, index: int) -> Path: ...
