"""The drawn set: captions that tell the truth, the same bytes every time."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from stable_diffusion.data.coco import CocoImageLoader
from stable_diffusion.data.shapes import COLOURS, PLACES, SHAPES, SIZES
from stable_diffusion.data.sources import Shapes
from stable_diffusion.errors import InputError
from stable_diffusion.images import open_image
from tests.test_files import posix, reachable, refusal, without_rights


def write_shapes(out: Path, **settings: int) -> Path:
    list(Shapes(**settings).make(out))
    return out


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("shapes") / "set", count=400, size=96)


def dominant_colour(image: Image.Image) -> str | None:
    """The name of the colour that most of the picture's shapes have; None if all of it is background."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32).reshape(-1, 3)
    depth = 255 - pixels.min(axis=1)
    pixels, depth = pixels[depth > 50], depth[depth > 50]
    # Fewer than 1 in 1,000 are specks.
    if len(pixels) * 1000 < image.width * image.height or not len(pixels):
        return None
    # A soft edge of red is pink, so only the pixels about as deep as the inside vote.
    inside = pixels[depth >= 0.75 * np.percentile(depth, 75)]
    distances = np.linalg.norm(inside[:, None] - np.array(list(COLOURS.values()), dtype=np.float32), axis=2)
    return list(COLOURS)[int(np.bincount(distances.argmin(axis=1)).argmax())]


def images(root: Path, split: str = "train") -> list[dict[str, Any]]:
    entries = json.loads((root / "annotations" / f"captions_{split}.json").read_text())["images"]
    return [{**entry, "pixels": open_image(root / split / entry["file_name"])} for entry in entries]


def singles(root: Path) -> list[dict[str, Any]]:
    return [entry | entry["shows"][0] for entry in images(root) if len(entry["shows"]) == 1]


def content(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def ink(pixels: Image.Image) -> np.ndarray:
    return np.asarray(pixels.convert("RGB")).min(2) < 200


def test_the_loader_reads_it_without_a_warning(drawn: Path) -> None:
    for split, count in {"train": 360, "val": 40}.items():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loader = CocoImageLoader(drawn / split, drawn / "annotations" / f"captions_{split}.json")
        assert len(loader) == count
        for index in range(0, count, 37):
            item = loader[index]
            assert item.image.size == (96, 96)
            assert 3 <= len(item.captions) <= 4
            assert len(set(item.captions)) == len(item.captions)


def test_two_runs_give_the_same_bytes(tmp_path: Path) -> None:
    first = content(write_shapes(tmp_path / "a", count=30, size=32, seed=5))
    assert len(first) == 32
    assert content(write_shapes(tmp_path / "b", count=30, size=32, seed=5)) == first
    other = content(write_shapes(tmp_path / "c", count=30, size=32, seed=6))
    assert sum(other[name] == first[name] for name in first) < 3


def test_a_longer_set_begins_with_the_same_pictures(tmp_path: Path) -> None:
    short = write_shapes(tmp_path / "a", count=20, size=32)
    long = write_shapes(tmp_path / "b", count=40, size=32)
    for path in (short / "train").iterdir():
        assert path.read_bytes() == (long / "train" / path.name).read_bytes()


def test_no_picture_is_in_both_splits(drawn: Path) -> None:
    train, val = ({path.read_bytes() for path in (drawn / split).iterdir()} for split in ("train", "val"))
    assert len(train) == 360
    assert not train & val


def test_every_factor_occurs_and_most_pictures_show_one_shape(drawn: Path) -> None:
    one = singles(drawn)
    assert 0.6 < len(one) / 360 < 0.8
    for key, table in {"shape": SHAPES, "colour": COLOURS, "size": SIZES, "place": PLACES}.items():
        assert {entry[key] for entry in one} == set(table)


def test_the_colour_is_the_one_in_the_caption(drawn: Path) -> None:
    assert all(dominant_colour(entry["pixels"]) == entry["colour"] for entry in singles(drawn))


def test_size_and_place_are_those_in_the_caption(drawn: Path) -> None:
    for entry in singles(drawn):
        rows, columns = (ink(entry["pixels"]).any(axis).nonzero()[0] for axis in (1, 0))
        height = (rows[-1] + 1 - rows[0]) / 96
        assert min(SIZES, key=lambda name: abs(SIZES[name] - height / 0.94)) == entry["size"]
        middle = (columns[0] + columns[-1] + 1) / 2 / 96, (rows[0] + rows[-1] + 1) / 2 / 96
        nearest = min(PLACES, key=lambda name: np.hypot(*np.subtract(PLACES[name], middle)))
        assert nearest == entry["place"]


def test_shapes_can_be_told_apart(tmp_path: Path) -> None:
    # One large centred picture of each kind; all differ from each other in much of the drawn area.
    masks: dict[str, np.ndarray] = {}
    for entry in singles(write_shapes(tmp_path / "set", count=1200, size=32)):
        if entry["size"] == "large" and entry["place"] == "centre":
            masks.setdefault(entry["shape"], ink(entry["pixels"]))
    assert set(masks) == set(SHAPES)
    for first, one in masks.items():
        for second, other in masks.items():
            if first < second:
                assert (one ^ other).sum() > 0.12 * (one | other).sum(), (first, second)
    assert not masks["ring"][16, 16]
    assert masks["circle"][16, 16]


def test_two_shapes_do_not_touch_and_differ_in_colour(drawn: Path) -> None:
    for entry in images(drawn):
        if len(entry["shows"]) == 2:
            first, second = entry["shows"]
            assert first["colour"] != second["colour"]
            pixels, box = entry["pixels"], (48, 96) if first["place"] == "left" else (96, 48)
            halves = [pixels.crop((0, 0, *box)), pixels.crop((96 - box[0], 96 - box[1], 96, 96))]
            assert [dominant_colour(half) for half in halves] == [first["colour"], second["colour"]]


def test_captions_name_what_is_shown(drawn: Path) -> None:
    data = json.loads((drawn / "annotations" / "captions_train.json").read_text())
    shows = {entry["id"]: entry["shows"] for entry in data["images"]}
    assert len({note["id"] for note in data["annotations"]}) == len(data["annotations"])
    words: Counter[str] = Counter()
    for note in data["annotations"]:
        caption = note["caption"].replace("gray", "grey").replace("center", "centre")
        words.update(note["caption"].replace(",", "").split())
        for figure in shows[note["image_id"]]:
            assert f"{figure['colour']} {figure['shape']}" in caption
        assert "a orange" not in caption
        if len(shows[note["image_id"]]) == 1:
            (figure,) = shows[note["image_id"]]
            assert not any(size in caption for size in SIZES if size != figure["size"])
    assert words["gray"]
    assert words["grey"]


def test_relations_are_true(drawn: Path) -> None:
    data = json.loads((drawn / "annotations" / "captions_train.json").read_text())
    shows = {entry["id"]: entry["shows"] for entry in data["images"]}
    order = {" to the left of ": (0, 1), " to the right of ": (1, 0), " above ": (0, 1), " below ": (1, 0)}
    seen = set()
    for note in data["annotations"]:
        for relation, (before, after) in order.items():
            if relation in note["caption"]:
                seen.add(relation)
                things = note["caption"].replace("gray", "grey").split(relation)
                figures = shows[note["image_id"]]
                assert things[0].endswith("{colour} {shape}".format(**figures[before]))
                assert figures[after]["colour"] in things[1]
                axis = 1 if relation in (" above ", " below ") else 0
                first, second = (PLACES[figures[nth]["place"]][axis] for nth in (before, after))
                assert (first < second) == (before == 0)
    assert seen == set(order)


def test_soft_edges_do_not_decide_the_colour(tmp_path: Path) -> None:
    # At 32 pixels half of a small ring is edge.
    entries = singles(write_shapes(tmp_path / "set", count=400, size=32))
    assert all(dominant_colour(entry["pixels"]) == entry["colour"] for entry in entries)


def test_dominant_colour_of_soft_noisy_and_empty_pictures() -> None:
    rng = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        image = Image.new("RGB", (64, 64), "white")
        ImageDraw.Draw(image).ellipse((20, 20, 44, 44), fill=colour)
        soft = image.resize((16, 16)).resize((64, 64), Image.Resampling.BILINEAR)
        noisy = np.clip(np.asarray(soft) + rng.normal(0, 12, (64, 64, 3)), 0, 255).astype(np.uint8)
        assert dominant_colour(Image.fromarray(noisy)) == name
    assert dominant_colour(Image.new("RGB", (64, 64), "white")) is None
    assert dominant_colour(Image.new("RGB", (64, 64), (226, 238, 252))) is None


def test_a_set_is_left_alone_or_replaced(tmp_path: Path) -> None:
    out = write_shapes(tmp_path / "set", count=10, size=32)
    before = content(out)
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    write_shapes(out, count=10, size=32)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == times
    write_shapes(out, count=5, size=32)
    assert len(content(out)) == 7
    write_shapes(out, count=10, size=32)
    assert content(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_what_a_user_put_into_a_set_stays(tmp_path: Path) -> None:
    out = write_shapes(tmp_path / "set", count=10, size=32)
    mine = {
        "notes.txt": b"mine",
        "train/mine.png": b"mine",
        "README.md": b"mine",
        "annotations/captions_mine.json": b"{}",
    }
    for name, text in mine.items():
        (out / name).write_bytes(text)
    write_shapes(out, count=5, size=32)
    write_shapes(tmp_path / "fresh", count=5, size=32)
    assert content(out) == content(tmp_path / "fresh") | {str(Path(name)): x for name, x in mine.items()}
    (out / "train" / "000007.png").write_bytes(b"mine")
    before = content(out)
    with pytest.raises(InputError, match=r"there is another file .*000007\.png"):
        write_shapes(out, count=10, size=32)
    assert content(out) == before


def test_captions_that_a_user_changed_past_reading_are_theirs(tmp_path: Path) -> None:
    out = write_shapes(tmp_path / "set", count=10, size=32)
    file = out / "annotations" / "captions_val.json"
    for text in ("[1]", "{", '{"info": {}}'):
        file.write_text(text)
        before = content(out)
        with pytest.raises(InputError, match="there is another file"):
            write_shapes(out, count=5, size=32)
        assert content(out) == before


@pytest.mark.parametrize("images", [5, "ab", {"a": 1}, None, [1, None, {"file_name": [1]}]])
def test_a_list_of_pictures_that_is_none_names_no_file(images: object, tmp_path: Path) -> None:
    out = write_shapes(tmp_path / "set", count=10, size=32)
    file = out / "annotations" / "captions_train.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"images": images}))
    before = content(out)
    with pytest.raises(InputError, match="there is another file"):
        write_shapes(out, count=12, size=32)
    assert content(out) == before


@posix
def test_missing_rights_to_captions_are_called_that(tmp_path: Path) -> None:
    out = write_shapes(tmp_path / "set", count=10, size=32)
    reachable(tmp_path)
    (out / "annotations" / "captions_train.json").chmod(0)
    assert "captions_train.json: Permission denied" in refusal(
        without_rights(lambda: write_shapes(out, count=12, size=32))
    )


def test_the_set_is_that_of_version_1(tmp_path: Path) -> None:
    """Text byte for byte; of the pixels the sum, as another Pillow may place an edge otherwise."""
    out = write_shapes(tmp_path / "set", count=60, size=48, seed=3)
    digest = hashlib.sha256()
    for path in sorted(out.rglob("*.json")):
        digest.update(path.read_bytes())
    assert digest.hexdigest()[:16] == "edc7b1e71a8b1091"
    total = sum(int(np.asarray(open_image(path), dtype=np.int64).sum()) for path in out.rglob("*.png"))
    assert total == pytest.approx(98115830, rel=1e-4)


def test_stopped_early_it_leaves_nothing(tmp_path: Path) -> None:
    steps = Shapes(count=10, size=32).make(tmp_path / "set")
    assert [next(steps) for _ in range(3)][-1] == ("drawing", 2, 10)
    steps.close()
    assert not any(tmp_path.iterdir())


def test_hidden_files_are_something_else_too(tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    with pytest.raises(InputError, match="something else than a set of shapes"):
        write_shapes(tmp_path, count=4, size=32)
    assert (tmp_path / ".git").is_dir()


def test_other_folders_are_not_touched(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "mine.png").write_text("mine")
    with pytest.raises(InputError, match="something else"):
        write_shapes(tmp_path, count=4, size=32)
    assert content(tmp_path) == {str(Path("train", "mine.png")): b"mine"}
    with pytest.raises(InputError, match="Not a directory"):
        write_shapes(tmp_path / "train" / "mine.png")
    with pytest.raises(InputError, match="cannot write"):
        write_shapes(tmp_path / "train" / "mine.png" / "deeper")


@pytest.mark.parametrize(("count", "size"), [(1, 32), (0, 32), (10, 8), (-5, 128)])
def test_numbers_that_are_too_small(tmp_path: Path, count: int, size: int) -> None:
    with pytest.raises(InputError, match=r"(count|size) must be from"):
        write_shapes(tmp_path / "set", count=count, size=size)
    assert not (tmp_path / "set").exists()
