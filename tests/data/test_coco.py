"""The COCO loader: what it gives, and that what it leaves out is counted and named."""

from __future__ import annotations

import json
import os
import pickle
import unicodedata
import warnings
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from stable_diffusion.data.coco import CocoImageLoader
from stable_diffusion.data.item import Files, Item, Source
from stable_diffusion.errors import InputError


def picture(path: Path, colour: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 8), colour).save(path)
    return path


def captions_file(folder: Path, images: Any, annotations: Any = None, **more: Any) -> Path:
    data = {"info": {}, "images": images, **more}
    if annotations is not None:
        data["annotations"] = annotations
    path = folder / "captions.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


def image(key: Any, name: Any) -> dict[str, Any]:
    return {"id": key, "file_name": name, "width": 12, "height": 8}


def note(key: Any, caption: Any) -> dict[str, Any]:
    return {"id": 1, "image_id": key, "caption": caption}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pictures").mkdir()
    return tmp_path


def refused(folder: Path, file: Path, pictures: str = "pictures") -> str:
    with pytest.raises(InputError) as caught:
        CocoImageLoader(folder / pictures, file)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_pictures_and_all_their_captions(folder: Path) -> None:
    picture(folder / "pictures" / "b.png", "blue")
    picture(folder / "pictures" / "a.png", "red")
    file = captions_file(
        folder,
        [image(1, "b.png"), image(2, "a.png")],
        [note(1, "blue"), note(2, " red\n"), note(1, "also  blue")],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loader = CocoImageLoader(str(folder / "pictures"), str(file))
    source: Source = loader
    assert len(loader) == 2
    entries = source.entries()
    assert [(entry.key, entry.captions) for entry in entries] == [
        *[("a.png", ("red",)), ("b.png", ("blue", "also blue"))]
    ]
    assert source.image("b.png").getpixel((0, 0)) == (0, 0, 255)
    assert isinstance(source, Files)
    with source.opened("b.png") as stored:
        assert (stored.format, stored.size) == ("PNG", (12, 8))
    assert [item.captions for item in loader] == [("red",), ("blue", "also blue")]
    assert isinstance(loader[0], Item) and loader[0].key == "a.png"
    assert loader[0].image.getpixel((0, 0)) == (255, 0, 0)
    assert loader[-1].image.getpixel((0, 0)) == (0, 0, 255)
    assert (loader.report.pictures, loader.report.captions) == (2, 3)
    assert str(loader.report) == "2 pictures with 3 captions"
    with pytest.raises(IndexError):
        loader[2]


def test_everything_left_out_is_counted_and_named(folder: Path) -> None:
    pictures = folder / "pictures"
    for name in ("good.png", "bare.png", "blank.png", "extra1.png", "extra2.JPG", "extra3.png", "extra4.png"):
        picture(pictures / name)
    (pictures / "text.png").write_text("no picture")
    (pictures / "Thumbs.db").touch()
    file = captions_file(
        folder,
        [
            image(1, "good.png"),
            image(2, "bare.png"),
            image(3, "blank.png"),
            image(4, "text.png"),
            image(5, "gone.png"),
            image(6, "gone-and-bare.png"),
        ],
        [
            note(1, "good"),
            note(1, None),
            note(1, 7),
            note(3, "  \n"),
            note(4, "text"),
            note(5, "gone"),
            note(99, "nobody"),
            note(99, "nobody again"),
        ],
    )
    with pytest.warns(UserWarning) as caught:
        loader = CocoImageLoader(pictures, file)
    report = loader.report
    assert [entry.key for entry in loader.entries()] == ["good.png"]
    assert (report.pictures, report.captions) == (1, 1)
    assert report.images_without_captions == (
        *("bare.png", "blank.png", "extra1.png", "extra2.JPG", "extra3.png", "extra4.png"),
        "gone-and-bare.png",
    )
    assert report.captions_without_images == ("gone.png", "image_id 99")
    assert report.unreadable == ("text.png",)
    assert report.unusable_captions == ("blank.png", "good.png", "good.png")
    (warning,) = caught
    text = str(warning.message)
    assert warning.filename == __file__
    assert "7 images without captions (bare.png, blank.png, extra1.png, …)" in text
    assert "extra2" not in text
    assert "2 captions without images (gone.png, image_id 99)" in text
    assert "1 unreadable (text.png)" in text
    assert "3 unusable captions" in text


def test_a_truncated_picture_is_named_when_it_is_read(folder: Path) -> None:
    path = folder / "pictures" / "a.jpg"
    Image.effect_noise((200, 200), 80).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    loader = CocoImageLoader(folder / "pictures", captions_file(folder, [image(1, "a.jpg")], [note(1, "x")]))
    with pytest.raises(InputError, match=r"a\.jpg is damaged"):
        loader[0]


def test_a_picture_that_is_gone_is_named_when_it_is_read(folder: Path) -> None:
    path = picture(folder / "pictures" / "a.png")
    loader = CocoImageLoader(folder / "pictures", captions_file(folder, [image(1, "a.png")], [note(1, "x")]))
    path.unlink()
    with pytest.raises(InputError, match=r"a\.png"):
        loader[0]
    with pytest.raises(InputError, match=r"a\.png"):
        loader.image("a.png")


def test_nothing_usable(folder: Path) -> None:
    picture(folder / "pictures" / "a.png")
    text = refused(folder, captions_file(folder, [image(1, "b.png")], [note(1, "x")]))
    assert "a.png" in text
    assert "b.png" in text
    assert "both are empty" not in text
    (folder / "empty").mkdir()
    assert "both are empty" in refused(folder, captions_file(folder, [], []), "empty")


def test_missing_folder_and_file(folder: Path) -> None:
    file = captions_file(folder, [], [])
    assert "no folder" in refused(folder, file, "none")
    assert "none.json" in refused(folder, folder / "none.json")
    assert "val2017" not in refused(folder, folder / "none.json")
    assert "val2017" in refused(folder, folder / "captions_test2017.json")
    assert "is not a file" in refused(folder, folder)


def test_test2017_has_no_captions(folder: Path) -> None:
    text = refused(folder, captions_file(folder, [image(1, "a.png")], categories=[]))
    assert "no captions" in text
    assert "val2017 or train2017" in text


@pytest.mark.parametrize("content", [b"", b"{", b"no json", b"\xff\xfe\x00", b"[" * 100_000])
def test_not_json(folder: Path, content: bytes) -> None:
    (folder / "captions.json").write_bytes(content)
    assert "not JSON" in refused(folder, folder / "captions.json")


@pytest.mark.parametrize("here", [7, "7", 7.0, "7.0", "000007"])
@pytest.mark.parametrize("there", [7, "7", 7.0, "7.0", "000007"])
def test_an_id_is_the_same_as_a_number_and_as_text(folder: Path, here: object, there: object) -> None:
    picture(folder / "pictures" / "a.png")
    picture(folder / "pictures" / "b.png")
    images, annotations = (
        [image(here, "a.png"), image("x7", "b.png")],
        [note(there, "red"), note("x7", "blue")],
    )
    loader = CocoImageLoader(folder / "pictures", captions_file(folder, images, annotations))
    assert [entry.captions for entry in loader.entries()] == [("red",), ("blue",)]


@pytest.mark.parametrize("key", [None, [1], {}, 1.5, float("nan"), float("inf")])
def test_what_is_no_id_is_said(folder: Path, key: object) -> None:
    picture(folder / "pictures" / "a.png")
    assert "has no 'id'" in refused(folder, captions_file(folder, [image(key, "a.png")], [note(1, "red")]))
    assert "has no 'image_id'" in refused(
        folder, captions_file(folder, [image(1, "a.png")], [note(key, "red")])
    )


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such pipes and devices")
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "loop"])
def test_what_is_no_file_is_said_at_once(folder: Path, kind: str) -> None:
    picture(folder / "pictures" / "a.png")
    for name in ("captions.json", "pictures/b.png"):
        path = folder / name
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        else:
            path.symlink_to(path if kind == "loop" else "/dev/zero")
    message = refused(folder, folder / "captions.json")
    assert "is not a file" in message or "cannot open" in message
    (folder / "captions.json").rename(folder / "aside")
    file = captions_file(folder, [image(1, "a.png"), image(2, "b.png")], [note(1, "red"), note(2, "blue")])
    with pytest.warns(UserWarning, match=r"1 unreadable \(b.png\)"):
        assert len(CocoImageLoader(folder / "pictures", file)) == 1


@pytest.mark.parametrize("data", [[], "text", None, {}, {"images": {}}, {"annotations": []}])
def test_json_of_another_shape(folder: Path, data: Any) -> None:
    (folder / "captions.json").write_text(json.dumps(data))
    assert "not a COCO captions file" in refused(folder, folder / "captions.json")


def test_an_instances_file_is_told_apart(folder: Path) -> None:
    annotations = [{"id": 1, "image_id": 1, "bbox": [0, 0, 1, 1]}]
    assert "have no captions" in refused(folder, captions_file(folder, [image(1, "a.png")], annotations))


@pytest.mark.parametrize(
    "entry", [None, {}, {"id": 1}, {"id": [1], "file_name": "a.png"}, image(1, 3), image(1, "")]
)
def test_malformed_image_entries_are_named(folder: Path, entry: Any) -> None:
    assert "image 1 in" in refused(folder, captions_file(folder, [image(2, "b.png"), entry], [note(2, "x")]))


@pytest.mark.parametrize("entry", [None, {}, {"caption": "x"}, note([1], "x")])
def test_malformed_annotations_are_named(folder: Path, entry: Any) -> None:
    assert "annotation 1 in" in refused(
        folder, captions_file(folder, [image(2, "b.png")], [note(2, "x"), entry])
    )


def test_one_id_for_two_pictures(folder: Path) -> None:
    assert "id 1" in refused(
        folder, captions_file(folder, [image(1, "a.png"), image(1, "b.png")], [note(1, "x")])
    )


@pytest.mark.parametrize(
    "name",
    [
        "../secret.png",
        "a/../../secret.png",
        "..\\secret.png",
        "C:\\secret.png",
        "\\\\host\\share\\a.png",
        "ABS",
    ],
)
def test_names_cannot_leave_the_folder(folder: Path, name: str) -> None:
    picture(folder / "pictures" / "a.png")
    secret = picture(folder / "secret.png")
    name = str(secret) if name == "ABS" else name
    file = captions_file(folder, [image(1, "a.png"), image(2, name)], [note(1, "x"), note(2, "y")])
    assert "outside the folder" in refused(folder, file)


def test_subfolders_and_two_entries_of_one_file(folder: Path) -> None:
    picture(folder / "pictures" / "sub" / "a.png")
    images = [image("x", "sub/a.png"), image("y", "./sub/a.png")]
    loader = CocoImageLoader(
        folder / "pictures", captions_file(folder, images, [note("x", "one"), note("y", "two")])
    )
    assert loader[0].key == "sub/a.png"
    assert loader[0].captions == ("one", "two")
    assert len(loader) == 1


@pytest.mark.parametrize("on_disk", ["NFC", "NFD"])
def test_unicode_names_and_captions(folder: Path, on_disk: Any) -> None:
    name = "Größe 猫 🐈.png"
    picture(folder / "pictures" / unicodedata.normalize(on_disk, name))
    loader = CocoImageLoader(
        folder / "pictures", captions_file(folder, [image(1, name)], [note(1, "eine Größe 🐈")])
    )
    assert loader[0].key == name
    assert loader[0].captions == ("eine Größe 🐈",)


def test_spawned_workers_can_have_it(folder: Path) -> None:
    picture(folder / "pictures" / "a.png")
    loader = CocoImageLoader(folder / "pictures", captions_file(folder, [image(1, "a.png")], [note(1, "x")]))
    copy = pickle.loads(pickle.dumps(loader))
    assert copy[0].captions == loader[0].captions
    assert copy[0].image.tobytes() == loader[0].image.tobytes()
    assert copy.report == loader.report


def test_the_order_does_not_depend_on_the_file(folder: Path) -> None:
    names = [f"{number}.png" for number in (3, 1, 2)]
    for name in names:
        picture(folder / "pictures" / name)
    images = [image(key, name) for key, name in enumerate(names)]
    notes = [note(key, name) for key, name in enumerate(names)]
    for order in (1, -1):
        loader = CocoImageLoader(folder / "pictures", captions_file(folder, images[::order], notes[::order]))
        assert [entry.key for entry in loader.entries()] == ["1.png", "2.png", "3.png"]
        assert [item.captions[0] for item in loader] == ["1.png", "2.png", "3.png"]


def test_weights_of_pictures(folder: Path) -> None:
    for name in ("a.png", "b.png"):
        picture(folder / "pictures" / name)
    images = [{**image(1, "a.png"), "weight": 0.25}, image(2, "b.png")]
    loader = CocoImageLoader(
        folder / "pictures", captions_file(folder, images, [note(1, "one"), note(2, "two")])
    )
    assert [entry.weight for entry in loader.entries()] == [0.25, 1.0]


def test_what_an_image_says_beyond_coco_s_own_are_fields(folder: Path) -> None:
    own = {"width": 1, "height": 1, "license": 3, "coco_url": "u", "flickr_url": "u", "date_captured": "d"}
    images = []
    for number, name in enumerate(("a.png", "sub/b.png", "c.png")):
        picture(folder / "pictures" / name)
        images.append({"id": number, "file_name": f"./{name}", "weight": 2, **own})
    images[0] |= {"object": "fox", "style_words": ["noto style"], "tone": None, "shows": [{"colour": "red"}]}
    images[1] |= {"split": "said"}
    notes = [note(number, "text") for number in range(3)]
    entries = CocoImageLoader(folder / "pictures", captions_file(folder, images, notes)).entries()
    found = {entry.key: entry.fields for entry in entries}
    more = {"object": "fox", "style_words": ["noto style"], "tone": None, "shows": [{"colour": "red"}]}
    assert found == {
        "a.png": {"split": "pictures", **more},
        "c.png": {"split": "pictures"},
        "sub/b.png": {"split": "said"},
    }


def test_another_picture_is_another_version(folder: Path) -> None:
    path = picture(folder / "pictures" / "a.png")
    loader = CocoImageLoader(folder / "pictures", captions_file(folder, [image(1, "a.png")], [note(1, "x")]))
    before = loader.entries()
    assert loader.entries() == before
    os.utime(path, ns=(1, 1))
    assert loader.entries()[0].version != before[0].version


@pytest.mark.parametrize("weight", [0, -1, "2", True, float("nan"), float("inf")])
def test_weights_are_positive_numbers(folder: Path, weight: Any) -> None:
    picture(folder / "pictures" / "a.png")
    file = captions_file(folder, [{**image(1, "a.png"), "weight": weight}], [note(1, "one")])
    message = refused(folder, file)
    assert "a.png" in message and repr(weight) in message and "above 0" in message


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_captions_of_every_unicode_encoding(folder: Path, encoding: str) -> None:
    """Windows' editors and PowerShell write UTF-16 and byte order marks."""
    picture(folder / "pictures" / "é.png")
    file = captions_file(folder, [image(1, "é.png")], [note(1, "лиса")])
    content = json.dumps(json.loads(file.read_text(encoding="utf-8")), ensure_ascii=False)
    file.write_bytes(content.encode(encoding))
    (entry,) = CocoImageLoader(folder / "pictures", file).entries()
    assert (entry.key, entry.captions) == ("é.png", ("лиса",))
    file.write_bytes(content.encode("cp1251", "replace"))
    assert "is not JSON in UTF-8" in refused(folder, file) and "save it in UTF-8" in refused(folder, file)


def test_backslashes_are_separators_and_that_is_said(folder: Path) -> None:
    picture(folder / "pictures" / "train" / "a.png")
    picture(folder / "pictures" / "b.png")
    images = [image(1, r"train\a.png"), image(2, r".\b.png")]
    file = captions_file(folder, images, [note(1, "one"), note(2, "two")])
    with pytest.warns(UserWarning, match="backslashes taken as separators of folders: in 2 names"):
        loader = CocoImageLoader(folder / "pictures", file)
    assert [entry.key for entry in loader.entries()] == ["b.png", "train/a.png"]
    assert not loader.report.left_out
    if os.sep == "/":  # where it can be part of a name, and is one here
        picture(folder / "pictures" / r"train\a.png")
        file = captions_file(folder, images[:1], [note(1, "one")])
        with pytest.warns(UserWarning, match=r"1 images without captions \(b\.png\)"):
            loader = CocoImageLoader(folder / "pictures", file)
        assert [entry.key for entry in loader.entries()] == [r"train\a.png"]
        assert loader.report.backslashes == 0
