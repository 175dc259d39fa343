"""Which pictures and captions are chosen: the same for every model, and those that the set's fields ask for."""

from __future__ import annotations

from pathlib import Path

import pytest

from stable_diffusion.errors import InputError
from stable_diffusion.evaluation import pictures as module
from stable_diffusion.evaluation.pictures import groups, open_splits
from tests.evaluation.drawings import write_drawings
from tests.tiny import shapes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_drawings(tmp_path_factory.mktemp("drawings"))


def test_splits_come_in_order_and_sisters_apart(folder: Path) -> None:
    splits = open_splits(folder)
    assert [split.name for split in splits] == ["train", "val", "test_object", "test_style"]
    assert [split.is_training for split in splits] == [True, False, False, False]
    names = [group.name for split in splits for group in groups(split, 0)]
    assert names == ["train", "val", "test_object", "test_style, no sister", "test_style, sister"]
    for split in splits:
        rows = sorted(row for group in groups(split, 0) for row in group.rows)
        assert rows == list(range(len(split.numbers)))


def test_a_picture_s_caption_names_its_style_and_keeps_its_seed(folder: Path) -> None:
    for split in open_splits(folder):
        assert split.styles is not None
        for group in groups(split, 0):
            for row in group.rows:
                caption = group.caption(row, 0)
                style = module.STYLES[split.styles[row]]
                assert caption in split.data.captions(split.numbers[row])
                assert f"{style.name} style" in caption or style.look in caption
                assert caption == group.caption(row, 0)


def test_the_seed_decides_and_nothing_else(folder: Path) -> None:
    train = open_splits(folder)[0]
    ((first,), (second,)) = groups(train, 0), groups(train, 1)
    assert first.rows == groups(open_splits(folder)[0], 0)[0].rows
    assert sorted(first.rows) == sorted(second.rows)
    assert first.rows != second.rows
    captions = [[group.caption(row, seed) for row in first.rows] for group, seed in ((first, 0), (first, 1))]
    assert captions[0] != captions[1]


def test_a_set_without_fields_is_read_as_coco_s_are(tmp_path: Path) -> None:
    shapes(tmp_path)
    train, val = open_splits(tmp_path)
    assert (train.objects, train.styles, train.sisters) == (None, None, None)
    (group,) = groups(val, 0)
    assert group.name == "val"
    assert group.caption(0, 0) in val.data.captions(val.numbers[0])


def test_of_a_large_split_a_fixed_part_is_taken(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = open_splits(folder)[0]
    monkeypatch.setattr(module, "MOST", 5)
    part = open_splits(folder)[0]
    assert len(part.numbers) == len(part.objects or ()) == 5
    assert set(part.names()) < set(whole.names())
    objects = dict(zip(whole.names(), whole.objects or (), strict=True))
    assert [objects[name] for name in part.names()] == part.objects


def test_a_folder_that_is_no_set_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="captions_NAME"):
        open_splits(tmp_path)
