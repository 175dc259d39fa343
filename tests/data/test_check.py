"""The check of a set: what training will see of it is counted, and what is wrong with it is named."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from stable_diffusion.data.check import SplitReport, check_set
from stable_diffusion.data.coco import coco_split, coco_splits
from stable_diffusion.data.item import Entry, Split
from stable_diffusion.errors import InputError

WORDS = 4  # that the reader of captions takes here


def cut(texts: list[str]) -> list[str]:
    return [" ".join(text.split()[WORDS:]) for text in texts]


def checked(splits: Sequence[Split], size: int = 8) -> tuple[SplitReport, ...]:
    steps = check_set(splits, size=size, cut=cut, context_length=WORDS)
    while True:
        try:
            step = next(steps)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
        assert 0 <= step.done <= step.total


def write_split(
    folder: Path, name: str, pictures: dict[str, tuple[Image.Image | bytes, list[str]]], **more: Any
) -> None:
    """A split in COCO's layout; `more` are labels, one for each picture."""
    (folder / name).mkdir(parents=True)
    (folder / "annotations").mkdir(exist_ok=True)
    images, annotations = [], []
    for number, (file, (picture, captions)) in enumerate(pictures.items()):
        if isinstance(picture, bytes):
            (folder / name / file).write_bytes(picture)
        else:
            picture.save(folder / name / file)
        labels = {key: values[number] for key, values in more.items()}
        images.append({"id": number, "file_name": file, **labels})
        annotations += [{"image_id": number, "caption": caption} for caption in captions]
    content = json.dumps({"images": images, "annotations": annotations})
    (folder / "annotations" / f"captions_{name}.json").write_text(content, encoding="utf-8")


def plain(colour: str, width: int = 8, height: int = 8) -> Image.Image:
    return Image.new("RGB", (width, height), colour)


def test_the_layout_of_coco_and_of_the_sets_made_here(tmp_path: Path) -> None:
    for name in ("val2017", "train2017"):
        write_split(tmp_path, name, {"a.png": (plain("red"), ["red"])})
    (tmp_path / "annotations" / "captions_test2017.json").write_text("{}")  # whose pictures are not there
    (tmp_path / "annotations" / "instances_val2017.json").write_text("{}")
    found = coco_splits(str(tmp_path))
    assert [split.name for split in found] == ["train2017", "val2017"]
    assert [split.is_training for split in found] == [True, False]
    for split in found:
        assert [(entry.key, entry.fields) for entry in split.entries] == [("a.png", {"split": split.name})]
    alone = coco_split(tmp_path / "val2017", tmp_path / "annotations" / "captions_val2017.json")
    assert (alone.name, alone.entries) == (found[1].name, found[1].entries)


def test_a_split_has_the_name_that_it_is_given(tmp_path: Path) -> None:
    write_split(tmp_path, "elsewhere", {"a.png": (plain("red"), ["red"])})
    (tmp_path / "annotations" / "captions_elsewhere.json").rename(
        tmp_path / "annotations/captions_train.json"
    )
    (tmp_path / "train").symlink_to(tmp_path / "elsewhere")
    (split,) = coco_splits(tmp_path)
    assert (split.name, split.entries[0].fields["split"]) == ("train", "train")


@pytest.mark.parametrize("made", [[], ["annotations"], ["train"], ["annotations/captions_train"]])
def test_a_folder_with_nothing_to_check(made: list[str], tmp_path: Path) -> None:
    for name in made:
        (tmp_path / name).mkdir(parents=True)
    with pytest.raises(InputError, match=r"'.*' holds no set, which is annotations/captions_NAME"):
        coco_splits(tmp_path)
    with pytest.raises(InputError, match="there is no folder"):
        coco_splits(tmp_path / "nowhere")


def test_everything_is_counted(tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    Image.effect_noise((64, 64), 50).save(broken)
    half = broken.read_bytes()[:1500]  # a sound header, so only decoding tells
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    frames = [plain("red"), plain("blue")]
    frames[0].save(tmp_path / "two.gif", save_all=True, append_images=frames[1:])
    write_split(
        tmp_path,
        "train",
        {
            "wide.png": (plain("green", 16, 8), ["a green rectangle", "green"]),
            "grey.png": (Image.new("L", (8, 8), 90), ["grey"]),
            "clear.png": (clear, ["nothing"]),
            "half.png": (half, ["noise"]),
            "red.png": (plain("red"), ["a very long red square", "a square that is red", "red"]),
            "small.png": (plain("blue", 6, 4), ["blue", "red"]),
            "text.png": (b"no picture", ["text"]),
            "two.gif": ((tmp_path / "two.gif").read_bytes(), ["red"]),
            "white.png": (plain("white"), ["white"]),
        },
    )
    with pytest.warns(UserWarning, match=r"text\.png"):
        splits = coco_splits(tmp_path)
    (report,) = checked(splits)
    assert (report.found.pictures, report.found.captions) == (7, 11)
    assert report.found.unreadable == ("half.png", "text.png")
    assert (report.distinct_captions, report.captions_per_picture) == (9, (1, 3))
    assert report.cut_captions == (("a very long red square", "square"), ("a square that is red", "red"))
    assert report.sizes == ((6, 4), (8, 8), (16, 8))
    assert report.enlarged == ("small.png",)
    assert (report.cropped, report.cropped_area) == (2, pytest.approx((1 / 2 + 1 / 3) / 2))
    assert (report.greyscale, report.transparent, report.several_frames) == (1, 1, 1)
    assert report.equal == (("two.gif", "red.png"), ("white.png", "clear.png"))  # as training sees them
    assert (report.in_training, report.styles, report.objects) == ((), {}, 0)
    assert str(report).splitlines() == [
        "train: 7 pictures with 11 captions",
        "    left out: 2 unreadable (half.png, text.png)",
        "  captions: 9 distinct, 1 to 3 for each picture",
        "  captions longer than the 4 tokens that the text encoder reads: 2;"
        " the longest, 'a very long red square', loses 'square'",
        "  sizes: smallest 6x4, median 8x8, largest 16x8",
        "  enlarged to 8 pixels: 1 (small.png)",
        "  cropped to a square: 2, which lose 42% of their area on average",
        "  greyscale: 1",
        "  transparent, laid on white: 1",
        "  of several frames, of which the first counts: 1",
        "  equal to another picture: 2 (two.gif = red.png, white.png = clear.png)",
    ]


def test_held_out_pictures_that_training_has_are_named(tmp_path: Path) -> None:
    write_split(tmp_path, "train", {"a.png": (plain("red"), ["red"]), "b.png": (plain("blue"), ["blue"])})
    held = {
        "c.png": (plain("blue"), ["blue"]),
        "d.png": (plain("white"), ["white"]),
        "e.png": (plain("red", 4, 16), ["as many red pixels, in another shape"]),
    }
    write_split(tmp_path, "test", held)
    write_split(tmp_path, "val", {"f.png": (plain("white"), ["white"])})
    train, test, val = checked(coco_splits(tmp_path))
    assert test.in_training == (("c.png", "b.png"),)
    assert train.in_training == val.in_training == ()
    assert "  also in training: 1 (c.png = b.png)" in str(test).splitlines()


def test_styles_and_objects_of_the_set_of_icons(tmp_path: Path) -> None:
    pictures = {f"{colour}.png": (plain(colour), [colour]) for colour in ("red", "green", "blue")}
    pictures["text.png"] = (b"no picture", ["text"])
    write_split(
        tmp_path,
        "train",
        pictures,  # type: ignore[arg-type] # dict is invariant
        style=["noto", "blob", "noto", "blob"],
        object=["fox", "fox", "cat", "dog"],
    )
    with pytest.warns(UserWarning, match=r"text\.png"):
        splits = coco_splits(tmp_path)
    (report,) = checked(splits)
    assert (report.styles, report.objects) == ({"noto": 2, "blob": 1}, 2)
    assert str(report).splitlines()[-2:] == ["  styles: noto 2, blob 1", "  objects: 2"]


def test_a_plain_set_takes_few_lines(tmp_path: Path) -> None:
    pictures = {f"{colour}.png": (plain(colour), [colour]) for colour in ("red", "green")}
    write_split(tmp_path, "any", pictures)  # type: ignore[arg-type] # dict is invariant
    (report,) = checked(coco_splits(tmp_path))
    assert str(report).splitlines() == [
        "any: 2 pictures with 2 captions",
        "  captions: 2 distinct, 1 for each picture, all within the 4 tokens that the text encoder reads",
        "  sizes: all 8x8",
    ]


def test_what_cannot_be_checked_is_one_sentence(tmp_path: Path) -> None:
    half = tmp_path / "half.png"
    Image.effect_noise((64, 64), 50).save(half)
    write_split(tmp_path, "train", {"half.png": (half.read_bytes()[:1500], ["noise"])})
    splits = coco_splits(tmp_path)
    with pytest.raises(InputError, match="none of the pictures in 'train' can be decoded"):
        checked(splits)
    with pytest.raises(InputError, match="at least 1 pixel, got 0"):
        checked(splits, size=0)
    (tmp_path / "annotations" / "captions_train.json").write_text("{")
    with pytest.raises(InputError, match="is not JSON"):
        coco_splits(tmp_path)


class Colours:
    """A source without files, a length or a report."""

    names = ("red", "green", "blue", "navy")

    def entries(self) -> list[Entry]:
        return [
            Entry(key=name, captions=(name, "a colour"), fields={"object": name[0], "style": "plain"})
            for name in self.names
        ]

    def image(self, key: str) -> Image.Image:
        if key == "navy":
            raise InputError("navy is damaged")
        return plain(key, 16)


def test_a_source_that_has_no_files(tmp_path: Path) -> None:
    source = Colours()
    write_split(tmp_path, "train", {"a.png": (plain("green", 16), ["green"])})
    (train,) = coco_splits(tmp_path)
    val = Split(name="val", source=source, entries=source.entries())
    report = checked([train, val])[1]
    assert (report.found.pictures, report.found.captions) == (3, 6)
    assert report.found.unreadable == ("navy",)
    assert report.in_training == (("green", "a.png"),)
    assert (report.styles, report.objects, report.sizes[0]) == ({"plain": 3}, 3, (16, 8))
    assert (report.greyscale, report.transparent, report.several_frames) == (0, 0, 0)
