"""What a run prepares once and keeps: when it is used again, when it is made anew, and what is left out."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from stable_diffusion import DiffusionModel, images
from stable_diffusion.config import MINILM
from stable_diffusion.data.cache import ArrayCache, digest
from stable_diffusion.data.coco import CocoImageLoader
from stable_diffusion.data.item import Entry
from stable_diffusion.errors import InputError
from stable_diffusion.training import workspace as workspaces
from stable_diffusion.training.stages.denoiser import DenoiserStage
from stable_diffusion.training.text import TextCache, TextReader
from stable_diffusion.training.workspace import Workspace
from tests.test_files import refusal, with_limit
from tests.tiny import STAGES, TEXT, TINY, shapes, tiny_model
from tests.training.record import Record

if sys.platform != "win32":
    import resource


def file(data: CocoImageLoader, index: int) -> Path:
    return data.image_folder / data.entries()[index].key


def result(progress: Any) -> Any:
    """What a generator returns."""
    while True:
        try:
            next(progress)
        except StopIteration as stop:
            return stop.value


@pytest.fixture
def own(tmp_path: Path) -> CocoImageLoader:
    """A set whose files a test may change."""
    return shapes(tmp_path / "shapes")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often pictures are decoded, and pictures and captions encoded."""
    counter: Counter[str] = Counter()
    model = tiny_model()

    def count(owner: type, name: str) -> None:
        original = getattr(owner, name)

        def counting(self: Any, *args: Any) -> Any:
            counter[f"{owner.__name__}.{name}"] += 1
            return original(self, *args)

        monkeypatch.setattr(owner, name, counting)

    count(CocoImageLoader, "opened")
    count(type(model.vae), "encode")
    count(type(model.text_encoder), "encode")
    return counter


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.npy*")}


# The array cache.


def fill(cache: ArrayCache, rows: np.ndarray) -> list[int]:
    return list(cache.fill(rows[i : i + 2] for i in range(0, len(rows), 2)))


def test_rows_are_written_once_and_read_back(tmp_path: Path) -> None:
    rows = np.arange(15, dtype=np.float16).reshape(5, 3)
    cache = ArrayCache(tmp_path / "new", "rows", "key", (5, 3), "float16")
    assert fill(cache, rows) == [2, 4, 5]
    assert fill(cache, rows * 0) == [], "they are there"
    assert cache.read().dtype == np.float16 and np.array_equal(cache.read(), rows)


def test_another_key_replaces_and_another_name_does_not(tmp_path: Path) -> None:
    rows = np.ones((4, 3))
    for name, key in (("rows", "one"), ("others", "one"), ("rows", "two")):
        fill(ArrayCache(tmp_path, name, key, (4, 3), "float32"), rows)
    assert names(tmp_path) == {"others-one.npy", "rows-two.npy"}


def test_a_cache_that_was_interrupted_is_filled_again(tmp_path: Path) -> None:
    rows = np.ones((4, 3))
    cache = ArrayCache(tmp_path, "rows", "key", (4, 3), "float32")
    filling = cache.fill(rows[i : i + 1] for i in range(4))
    next(filling)
    filling.close()  # type: ignore[attr-defined]
    assert not cache.path.exists()
    assert fill(cache, rows) == [2, 4] and names(tmp_path) == {"rows-key.npy"}


@pytest.mark.skipif(os.name != "posix", reason="processes are forked")
def test_what_a_killed_run_left_is_removed(tmp_path: Path) -> None:
    """Of this cache alone: another one may be filled at the same time."""
    for name in ("rows", "rows-2"):
        if not (pid := os.fork()):
            filling = ArrayCache(tmp_path, name, "old", (4, 3), "float32").fill([np.ones((1, 3))] * 4)
            next(filling)
            os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(pid, 0)
    fill(ArrayCache(tmp_path, "rows-2", "one", (4, 3), "float32"), np.ones((4, 3)))
    assert {name[:10] for name in names(tmp_path)} == {".rows-old.", "rows-2-one"}
    fill(ArrayCache(tmp_path, "rows", "key", (4, 3), "float32"), np.ones((4, 3)))
    assert names(tmp_path) == {"rows-key.npy", "rows-2-one.npy"}


def test_a_full_disk_is_said_before_anything_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(ArrayCache(tmp_path, "rows", "old", (4, 3), "float32"), np.ones((4, 3)))

    class Usage(NamedTuple):
        free: int

    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(3_900_000_000))
    cache = ArrayCache(tmp_path, "rows", "key", (10**9,), "float32")
    with pytest.raises(
        InputError, match=r"has 3,900 MB free and rows-key\.npy needs 4,000 MB there: make room"
    ):
        fill(cache, np.ones(4))
    assert names(tmp_path) == {"rows-old.npy"}


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="the system cannot promise room")
def test_a_disk_that_fills_up_is_a_sentence_not_the_end_of_the_process(tmp_path: Path) -> None:
    """A file of blanks takes no room; writing to its mapping where there is none would be a bus error."""
    cache = ArrayCache(tmp_path, "rows", "key", (10**6,), "float32")
    limited = with_limit(resource.RLIMIT_FSIZE, 10**6, lambda: fill(cache, np.ones(4)))
    assert "rows-key.npy: File too large" in refusal(limited)
    blank = cache.fill([np.ones(4)])
    next(blank)
    (building,) = tmp_path.glob(".rows-key.npy.*/new")
    assert building.stat().st_blocks * 512 >= 4 * 10**6
    blank.close()  # type: ignore[attr-defined]
    assert names(tmp_path) == set()


def test_digests_tell_apart_what_differs() -> None:
    array = np.arange(4.0)
    parts: list[tuple[object, ...]] = [
        ("a", "bc"),
        ("ab", "c"),
        (array,),
        (array + 1e-9,),
        (array.astype("f4"),),
        (1,),
        ("1",),
    ]
    assert len({digest(*part) for part in parts}) == len(parts)
    assert digest("a", array) == digest("a", array.copy())


# In a run.


def workspace(data: CocoImageLoader, folder: Path, model: DiffusionModel | None = None) -> Workspace:
    return Workspace(model or tiny_model(), data, data.entries(), folder)


def said(captions: list[str], folder: Path, model: DiffusionModel) -> Workspace:
    """Of a set that has these captions."""

    class Nothing:
        def entries(self) -> list[Entry]:
            return [Entry(key="one", captions=tuple(captions))]

        def image(self, key: str) -> Image.Image:
            raise AssertionError("no picture is needed")

    return Workspace(model, Nothing(), Nothing().entries(), folder)


def run(
    folder: Path, data: CocoImageLoader, *, model: DiffusionModel | None = None, **settings: Any
) -> set[str]:
    (model or tiny_model()).train(data, STAGES, output_dir=folder, steps=2, **settings)
    return names(folder / "cache")


def test_the_second_run_computes_nothing_twice(
    tmp_path: Path, own: CocoImageLoader, calls: Counter[str]
) -> None:
    def work() -> Counter[str]:
        calls.clear()
        run(tmp_path / "run", own)
        return +calls

    first = work()
    assert first["CocoImageLoader.opened"] == len(own) and first["PromptEncoder.encode"] > 0
    second = work()
    # Of the first's pictures, latents and captions none; the latents' standard deviation is measured.
    assert second["CocoImageLoader.opened"] == second["PromptEncoder.encode"] == 0
    kept = run(tmp_path / "run", own)
    assert kept == run(tmp_path / "run", own) and len(kept) == 3


def parts(kept: set[str]) -> dict[str, str]:
    return {name.rsplit("-", 1)[0]: name for name in kept}


def test_a_changed_picture_makes_new_pictures_and_latents(tmp_path: Path, own: CocoImageLoader) -> None:
    before = parts(run(tmp_path / "run", own))
    Image.new("RGB", (32, 32), "red").save(file(own, 3))
    after = parts(run(tmp_path / "run", own))
    assert {name for name in before if before[name] != after[name]} == {"pictures", "latents"}
    pictures = np.load(tmp_path / "run/cache" / after["pictures"])
    assert (pictures[3] == (255, 0, 0)).all()
    os.utime(file(own, 3), ns=(1, 1))
    assert parts(run(tmp_path / "run", own))["pictures"] != after["pictures"]


def test_another_size_makes_all_pictures_anew(tmp_path: Path, own: CocoImageLoader) -> None:
    small = result(workspace(own, tmp_path, tiny_model(replace(TINY, sample_size=16))).pictures())
    stale = names(tmp_path)
    large = result(workspace(own, tmp_path).pictures())
    assert small.shape == (9, 16, 16, 3) and large.shape == (9, 32, 32, 3)
    assert len(names(tmp_path)) == 1 and not names(tmp_path) & stale, "the stale one is removed"
    for index in range(len(own)):
        assert np.array_equal(large[index], np.asarray(own[index].image)), "32 pixels are the file's own"


def test_other_autoencoder_weights_make_new_latents(tmp_path: Path, own: CocoImageLoader) -> None:
    model = tiny_model()
    latents = np.array(result(workspace(own, tmp_path, model).latents()))
    expected = model.encode([own[i].image for i in range(len(own))])
    np.testing.assert_allclose(latents, expected, atol=2e-3)
    with torch.no_grad():
        model.vae.encoder.layers[-1].bias[0] += 1e-3
    stale = names(tmp_path)
    again = np.array(result(workspace(own, tmp_path, model).latents()))
    assert not np.array_equal(again, latents)
    assert len(names(tmp_path)) == 2 and len(names(tmp_path) & stale) == 1


def test_many_captions_are_encoded_as_they_are_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, captions = tiny_model(), [f"{n} foxes and a {c} drum" for n in range(40) for c in ("red", "blue")]
    (cached,) = result(said(captions, tmp_path, model).text())
    kept = names(tmp_path)
    monkeypatch.setattr(workspaces, "MOST_CACHED", 10)
    (reader,) = result(said(captions, tmp_path, model).text())
    assert names(tmp_path) == kept
    assert isinstance(cached, TextCache) and isinstance(reader, TextReader)
    for some in ([3, 0, 7, 7], [80]):
        for one, other in zip(cached.read(some), reader.read(some), strict=True):
            assert one.shape == other.shape
            torch.testing.assert_close(one.float(), other.float(), atol=3e-2, rtol=0)
    reader.change = cached.change = None
    for one, other in zip(cached.read([5, 6]), reader.read([5, 6]), strict=True):
        torch.testing.assert_close(one.float(), other.float(), atol=2e-3, rtol=0)


def test_other_captions_or_text_weights_make_new_embeddings(tmp_path: Path) -> None:
    model, seen = tiny_model(), []
    for caption in ("a", "b", "a"):
        result(said([caption], tmp_path, model).text())
        seen.append(names(tmp_path))
        assert len(seen[-1]) == 1
    assert seen[0] == seen[2] != seen[1]
    with torch.no_grad():
        model.text_encoder.encoders[0].final_layer_norm.weight[0] = 2  # type: ignore[union-attr]
    result(said(["a"], tmp_path, model).text())
    assert names(tmp_path) != seen[2]


# Text.


CAPTIONS = [
    "",
    "a red circle",
    "grey",
    "a small blue star in the top left and a large green heart in the middle of it",
]


@pytest.mark.parametrize(
    "encoders", [(TEXT,), (MINILM,), (replace(TEXT, trainable=True), MINILM)], ids=["clip", "bert", "both"]
)
def test_cached_text_is_the_encoders_output(tmp_path: Path, encoders: Any) -> None:
    unet = replace(TINY.unet, pooled_projection_dim=sum(encoder.hidden_size for encoder in encoders))
    model = tiny_model(replace(TINY, text_encoders=encoders, unet=unet))
    work = said(CAPTIONS, tmp_path, model)
    caches: list[TextCache | None] = result(work.text())
    assert [cache is None for cache in caches] == [encoder.trainable for encoder in encoders]
    order = [3, 0, 1, 1, 2]
    for i, cache in enumerate(caches):
        if cache is None:
            continue
        assert cache.change is not None, "whitened"
        cache.change = None
        tokens, mask, pooled = cache.read(order)
        with torch.no_grad():
            expected = model.text_encoder.encode(i, [work.captions[number] for number in order])
        real = torch.ones_like(mask) if expected.mask is None else expected.mask
        assert torch.equal(mask, real)
        torch.testing.assert_close(tokens[real], expected.tokens[real], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(pooled, expected.pooled, rtol=1e-3, atol=1e-3)
        assert not tokens[~real].any() and not torch.allclose(tokens[0], tokens[1])


# Damage.


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.fixture
def large(tmp_path: Path) -> CocoImageLoader:
    """Pictures whose half still has a header."""
    return shapes(tmp_path / "large", count=8, size=64)


def test_damaged_pictures_are_named_and_left_out(tmp_path: Path, large: CocoImageLoader) -> None:
    for index in (0, 4):
        truncate(file(large, index))
        with pytest.raises(InputError):
            images.open_image(file(large, index))
    message = (
        f"2 pictures cannot be decoded and are left out: {large.entries()[0].key}, {large.entries()[4].key}"
    )
    for _ in range(2):  # from the files, then from the cache
        work = workspace(large, tmp_path / "cache")
        with pytest.warns(UserWarning, match=message):
            pictures = result(work.pictures())
        kept = [1, 2, 3, 5, 6]
        assert [entry.key for entry in work.kept] == [large.entries()[index].key for index in kept]
        assert pictures.shape == (5, 32, 32, 3)
        for row, index in enumerate(kept):
            assert np.array_equal(pictures[row], np.asarray(images.cover(large[index].image, 32, 32)))


def test_captions_stay_with_their_pictures(tmp_path: Path, large: CocoImageLoader) -> None:
    """The captions that the denoiser samples for a row are those of the picture that is left in it."""
    truncate(file(large, 2))
    stage = DenoiserStage(tiny_model(), STAGES[1])
    with pytest.warns(UserWarning, match="1 pictures cannot be decoded"):
        result(stage.prepare(workspace(large, tmp_path)))
    kept = [index for index in range(len(large)) if index != 2]
    texts = [tuple(stage.captions[number] for number in numbers) for numbers in stage.captions_of]
    assert texts == [large.entries()[index].captions for index in kept] and stage.captions[0] == ""
    assert stage.latents is not None and len(stage.latents) == len(kept)


def test_none_decodable_is_an_error(tmp_path: Path, large: CocoImageLoader) -> None:
    for index in range(len(large)):
        truncate(file(large, index))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(InputError, match=f"none of the {len(large)} pictures can be decoded"):
            tiny_model().train(large, STAGES, output_dir=tmp_path / "run", steps=1)


def test_preparation_is_shown(tmp_path: Path, own: CocoImageLoader) -> None:
    record = Record()
    run(tmp_path / "run", own, callback=record)
    captions = len({caption for entry in own.entries() for caption in entry.captions}) + 1
    for stage, total in (("reading pictures", 9), ("encoding pictures", 9), ("encoding captions", captions)):
        steps = record.stage(stage)
        assert {step.total for step in steps} == {total} and steps[-1].index == total - 1
        assert [step.index for step in steps] == sorted(step.index for step in steps)


def stages(record: Record) -> Iterator[str]:
    seen = None
    for event in record.events[1:]:
        if event.stage != seen:  # type: ignore[attr-defined]
            seen = event.stage  # type: ignore[attr-defined]
            yield str(seen)


def test_rooms_are_met_in_order(tmp_path: Path, own: CocoImageLoader) -> None:
    record = Record()
    run(tmp_path / "run", own, callback=record)
    assert list(stages(record)) == [
        "reading pictures",
        "autoencoder",
        "encoding pictures",
        "encoding captions",
        "denoiser",
    ]
