"""The contract of sources: pictures by key in their order, decoded on threads, and no further ahead than needed."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator

import pytest
from PIL import Image

from stable_diffusion.data.item import THREADS, Entry, Split, Streams, ahead, squares
from stable_diffusion.errors import InputError


class Greys:
    """Pictures of one grey each; what is no number is damaged."""

    def __init__(self) -> None:
        self.threads: set[str] = set()
        self.together = threading.Barrier(2)

    def entries(self) -> list[Entry]:
        return []

    def image(self, key: str) -> Image.Image:
        self.threads.add(threading.current_thread().name)
        if not key.isdigit():
            raise InputError(f"{key} is damaged")
        return Image.new("RGB", (1, 1), (int(key),) * 3)


def test_pictures_come_in_order_and_errors_in_their_place() -> None:
    keys = [*map(str, range(50)), "x", "7"]
    found = list(squares(Greys(), keys, 2))
    assert isinstance(found[50], InputError) and str(found[50]) == "x is damaged"
    assert isinstance(found[0], Image.Image) and found[0].size == (2, 2)
    values = [picture.getpixel((0, 0))[0] for picture in found if isinstance(picture, Image.Image)]  # type: ignore[index]
    assert values == [*range(50), 7]


def test_two_are_decoded_at_once() -> None:
    class Waiting(Greys):
        def image(self, key: str) -> Image.Image:
            self.together.wait(timeout=10)  # breaks if the other is not being decoded meanwhile
            return super().image(key)

    source = Waiting()
    assert len(list(squares(source, ["1", "2"], 2, threads=2))) == 2
    assert threading.current_thread().name not in source.threads


def test_no_more_is_done_than_a_little_ahead() -> None:
    asked: list[int] = []

    def items() -> Iterator[int]:
        for i in range(1000):
            asked.append(i)
            yield i

    steps = ahead(str, items())
    assert next(steps) == "0"
    assert len(asked) == 2 * THREADS + 1
    steps.close()  # type: ignore[attr-defined]


def test_a_source_s_own_stream_is_taken() -> None:
    class Shards(Greys):
        def stream(self, keys: Iterable[str]) -> Iterator[Image.Image]:
            return (Greys.image(self, key) for key in keys)

    source = Shards()
    assert isinstance(source, Streams) and not isinstance(Greys(), Streams)
    found = list(squares(source, ["1", "2"], 3))
    assert [picture.size for picture in found if isinstance(picture, Image.Image)] == [(3, 3), (3, 3)]
    assert source.threads == {threading.current_thread().name}


@pytest.mark.parametrize(("values", "found"), [(["a", "b"], ["a", "b"]), (["a", None], None), ([], [])])
def test_a_field_of_a_split_is_there_or_not(values: list[object], found: list[str] | None) -> None:
    entries = [Entry(key=str(i), captions=("x",), fields={"style": value}) for i, value in enumerate(values)]
    assert Split(name="any", source=Greys(), entries=entries).field("style") == found
    assert Split(name="any", source=Greys(), entries=entries).field("object") == ([] if not values else None)
