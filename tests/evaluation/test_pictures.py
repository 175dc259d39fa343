"""Which pictures and captions are chosen: the same for every model, and those that the set's fields ask for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stable_diffusion.data.coco import coco_splits
from stable_diffusion.data.item import Entry, Split
from stable_diffusion.errors import InputError
from stable_diffusion.evaluation import pictures as module
from stable_diffusion.evaluation.pictures import groups, in_order, pictures
from tests.evaluation.drawings import write_drawings
from tests.tiny import shapes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_drawings(tmp_path_factory.mktemp("drawings"))


def opened(folder: Path) -> list[Split]:
    return in_order(coco_splits(folder))


def test_splits_come_in_order_and_parts_apart(folder: Path) -> None:
    splits = opened(folder)
    assert [split.name for split in splits] == ["train", "val", "test_object", "test_style"]
    assert [split.is_training for split in splits] == [True, False, False, False]
    names = [group.name for split in splits for group in groups(split, 0)]
    assert names == ["train", "val", "test_object", "test_style, no sister", "test_style, sister"]
    for split in splits:
        rows = sorted(row for group in groups(split, 0) for row in group.rows)
        assert rows == list(range(len(split.entries)))


def test_a_picture_s_caption_names_its_style_and_keeps_its_seed(folder: Path) -> None:
    for split in opened(folder):
        for group in groups(split, 0):
            for row in group.rows:
                entry, caption = split.entries[row], group.caption(row, 0)
                words = entry.fields["style_words"]
                assert caption in entry.captions
                assert isinstance(words, list) and sum(word in caption for word in words) == 1
                assert caption == group.caption(row, 0)


def test_the_seed_decides_and_nothing_else(folder: Path) -> None:
    train = opened(folder)[0]
    ((first,), (second,)) = groups(train, 0), groups(train, 1)
    assert first.rows == groups(opened(folder)[0], 0)[0].rows
    assert sorted(first.rows) == sorted(second.rows)
    assert first.rows != second.rows
    captions = [[group.caption(row, seed) for row in first.rows] for group, seed in ((first, 0), (first, 1))]
    assert captions[0] != captions[1]


def test_a_set_without_fields_is_read_as_coco_s_are(tmp_path: Path) -> None:
    shapes(tmp_path)
    train, val = opened(tmp_path)
    assert (train.field("object"), train.field("style"), train.field("part")) == (None, None, None)
    (group,) = groups(val, 0)
    assert group.name == "val"
    assert group.caption(0, 0) in val.entries[0].captions


def test_a_set_of_before_is_evaluated_by_what_it_says(tmp_path: Path) -> None:
    """Icons of version 2 have object, style and sister: no words of styles, and no parts."""
    write_drawings(tmp_path)
    for file in (tmp_path / "annotations").iterdir():
        content = json.loads(file.read_text())
        for image in content["images"]:
            image["sister"] = image.pop("part", "") == "sister"
            del image["style_words"]
        file.write_text(json.dumps(content))
    splits = opened(tmp_path)
    assert [group.name for split in splits for group in groups(split, 0)] == [split.name for split in splits]
    assert all(split.field("object") and split.field("style") for split in splits)
    (train,) = groups(splits[0], 0)
    bare = [row for row in train.rows if train.caption(row, 0) == splits[0].entries[row].fields["object"]]
    assert 0 < len(bare) < len(train.rows)


def test_a_field_counts_where_all_entries_have_it() -> None:
    def split(*values: object) -> Split:
        entries = [Entry(key=str(i), captions=("x",), fields={"part": v}) for i, v in enumerate(values)]
        return Split(name="any", source=Pixels(), entries=entries)

    assert [group.name for group in groups(split("b", "a", "b"), 0)] == ["any, a", "any, b"]
    assert [group.name for group in groups(split("b", None, "b"), 0)] == ["any"]
    assert [group.name for group in groups(split("b", 7, "b"), 0)] == ["any"]


def test_of_a_large_split_a_fixed_part_is_taken(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = opened(folder)[0]
    monkeypatch.setattr(module, "MOST", 5)
    part = opened(folder)[0]
    assert len(part.entries) == len(part.field("object") or ()) == 5
    assert part.entries == [entry for entry in whole.entries if entry in part.entries]


class Pixels:
    """A source of one-pixel pictures, one of them damaged."""

    def entries(self) -> list[Entry]:
        return [Entry(key=str(i), captions=("x",)) for i in range(40)]

    def image(self, key: str) -> Image.Image:
        if key == "39":
            raise InputError("39 is damaged")
        return Image.new("RGB", (1, 1), (int(key), 0, 0))


def test_pictures_of_any_source_in_the_order_of_rows() -> None:
    split = Split(name="any", source=Pixels(), entries=Pixels().entries())
    rows = [7, 3, 30, *range(20)]
    found = np.stack(list(pictures(split, 2, rows)))
    assert found.shape == (23, 2, 2, 3)
    assert found[:, 0, 0, 0].tolist() == rows
    with pytest.raises(InputError, match="39 is damaged"):
        list(pictures(split, 2))
