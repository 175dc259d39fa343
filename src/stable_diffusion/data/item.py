"""What a set of captioned images is to everything that reads one."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

from PIL import Image

from stable_diffusion import images
from stable_diffusion.errors import InputError

A = TypeVar("A")
B = TypeVar("B")

THREADS = 8  # that decode: PIL does it outside Python's lock
TRAINING = "train"
"""What the name of a split to learn from begins with: train, train2017."""


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


@runtime_checkable
class Files(Source, Protocol):
    """A source whose pictures lie in files, of which a check can say more."""

    def opened(self, key: str) -> AbstractContextManager[Image.Image]:
        """The picture as it is stored, not decoded yet. Raises InputError, also inside the ``with`` block."""
        ...


@runtime_checkable
class Streams(Source, Protocol):
    """A source that reads its pictures best one after the other."""

    def stream(self, keys: Iterable[str]) -> Iterator[Image.Image | InputError]:
        """The pictures of these keys in their order; the error of a damaged one."""
        ...


class Joined:
    """Sources of files one after the other, whose keys differ."""

    def __init__(self, sources: Sequence[Files]) -> None:
        self._entries = [source.entries() for source in sources]
        self._sources = {
            entry.key: source for source, some in zip(sources, self._entries, strict=True) for entry in some
        }

    def entries(self) -> Sequence[Entry]:
        """Those of the first source, then those of the next."""
        return [entry for some in self._entries for entry in some]

    def image(self, key: str) -> Image.Image:
        """The picture of an entry. Raises InputError if it cannot be decoded."""
        return self._sources[key].image(key)

    def opened(self, key: str) -> AbstractContextManager[Image.Image]:
        """The picture as it is stored, not decoded yet. Raises InputError, also inside the ``with`` block."""
        return self._sources[key].opened(key)


@dataclass(frozen=True, kw_only=True)
class Split:
    """A named part of a set."""

    name: str
    source: Source
    entries: Sequence[Entry]
    """The source's; fewer where not all of them are wanted."""

    @property
    def is_training(self) -> bool:
        """Whether models are trained on it, by its name."""
        return self.name.startswith(TRAINING)

    def field(self, name: str) -> list[str] | None:
        """What the entries say there, in words; None unless all of them do."""
        values = [value for entry in self.entries if isinstance(value := entry.fields.get(name), str)]
        return values if len(values) == len(self.entries) else None


def squares(
    source: Source, keys: Iterable[str], size: int, threads: int = THREADS, *, alpha: bool = False
) -> Iterator[Image.Image | InputError]:
    """The pictures of these keys in their order, cut and scaled to squares of `size` pixels a side.

    RGB, on white; with `alpha` RGBA where a file is transparent.

    They are made on threads a little ahead, unless the source ``Streams``. In place of a damaged one its error.
    """

    def square(key: str) -> Image.Image | InputError:
        try:
            if not isinstance(source, Files):
                return images.cover(source.image(key), size, size)
            with source.opened(key) as image:  # as long as it is large, it counts for what may be decoded
                return images.cover(images.decoded(image, alpha=alpha), size, size)
        except InputError as error:
            return error

    if not isinstance(source, Streams):
        yield from ahead(square, keys, threads)
        return
    for picture in source.stream(keys):
        yield picture if isinstance(picture, InputError) else images.cover(picture, size, size)


def ahead(work: Callable[[A], B], items: Iterable[A], threads: int = THREADS) -> Iterator[B]:
    """What `work` makes of each item, in their order, done on threads a little before it is asked for."""
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[B]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


class Progress(NamedTuple):
    """How far work on a set has come."""

    what: str
    """What is being done, such as "drawing"."""
    done: int
    total: int
