"""The set of icons: names, captions and splits by rule, and the whole builder against tiny packages."""

from __future__ import annotations

import hashlib
import io
import json
import os
import stat
import sys
import tarfile
import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from stable_diffusion.data import icon_packages
from stable_diffusion.data.coco import CocoImageLoader, coco_split
from stable_diffusion.data.icon_captions import (
    STYLES,
    TONES,
    Thing,
    captions,
    chance,
    plain_code,
    read_things,
    slug,
    slugs,
)
from stable_diffusion.data.icon_packages import NAMES, PACKAGES, find_code
from stable_diffusion.data.icon_splits import HASH_RULE, SPLITS, sisters, split_pictures
from stable_diffusion.data.icons import merged
from stable_diffusion.data.item import Progress
from stable_diffusion.data.sources import Icons
from stable_diffusion.errors import InputError
from stable_diffusion.evaluation.pictures import groups
from stable_diffusion.images import to_rgb

GROUPS = {
    "groups": {
        "0": "smileys-emotion",
        "1": "people-body",
        "2": "component",
        "3": "animals-nature",
        "9": "flags",
    },
    "subgroups": {
        "25": "person-role",
        "32": "skin-tone",
        "34": "animal-mammal",
        "58": "time",
        "98": "country-flag",
    },
}


def emoji(label: str, code: str, group: int | None = 3, subgroup: int = 34, **more: Any) -> dict[str, Any]:
    return {"label": label, "hexcode": code, "group": group, "subgroup": subgroup, "version": 1, **more}


def toned(label: str, code: str, pair: bool = False) -> dict[str, Any]:
    first, _, rest = code.partition("-")
    skins: list[dict[str, Any]] = [
        {
            "label": f"{label}: {tone} skin tone",
            "hexcode": f"{first}-{0x1F3FB + nth:X}-{rest}".strip("-"),
            "tone": nth + 1,
        }
        for nth, tone in enumerate(TONES)
    ]
    if pair:
        skins.append({"label": f"{label}: two", "hexcode": f"{first}-1F3FB-200D-1F3FC", "tone": [1, 2]})
    return emoji(label, code, 1, 25, skins=skins)


DATA = [
    emoji("fox", "1F98A", tags=["animal", "face", "fox"]),
    emoji("cat face", "1F431"),
    emoji("owl", "1F989"),
    emoji("two-hump camel", "1F42B"),
    emoji("paw prints", "1F43E"),
    emoji("four o’clock", "1F553", subgroup=58),
    emoji("flag: Bosnia & Herzegovina", "1F1E7-1F1E6", 9, 98),
    emoji("light skin tone", "1F3FB", 2, 32),
    {"label": "regional indicator A", "hexcode": "1F1E6", "version": 0},
    toned("student", "1F9D1-200D-1F393"),
    toned("man student", "1F468-200D-1F393"),
    toned("woman student", "1F469-200D-1F393"),
    toned("man: red hair", "1F468-200D-1F9B0"),
    toned("person: red hair", "1F9D1-200D-1F9B0"),
    toned("people holding hands", "1F91D", pair=True),
    emoji("family: man, girl, girl", "1F468-200D-1F467-200D-1F467", 1, 25),
    emoji("couple with heart: man, man", "1F468-200D-2764-FE0F-200D-1F468", 1, 25),
]  # fmt: skip


@pytest.fixture(scope="module")
def things() -> dict[str, Thing]:
    return read_things(DATA, GROUPS)


def named(things: dict[str, Thing], name: str, tone: str | None = None) -> Thing:
    (thing,) = (thing for thing in things.values() if (thing.object, thing.tone) == (name, tone))
    return thing


def test_names_become_phrases(things: dict[str, Thing]) -> None:
    phrases = {f"{thing.article} {thing.object}".strip() for thing in things.values()}
    assert phrases == {
        *("a fox", "a cat face", "an owl", "a two-hump camel", "paw prints", "a clock at four o'clock"),
        *(
            "the flag of Bosnia and Herzegovina",
            "the letter A",
            "a student",
            "a man student",
            "a woman student",
        ),
        *("a man with red hair", "a person with red hair", "people holding hands"),
        *("a family of man, girl and girl", "a couple with heart between man and man"),
    }


def test_things_know_their_tone_gender_and_role(things: dict[str, Thing]) -> None:
    assert "1f91d-1f3fb-200d-1f3fc" not in things  # two tones
    woman = named(things, "woman student", "medium-dark")
    assert (woman.gender, woman.role, woman.group) == ("woman", "student", "people-body")
    assert woman.code == "1f469-1f3fe-200d-1f393"
    assert named(things, "man with red hair").role == "person with red hair"
    assert named(things, "couple with heart between man and man").gender is None
    assert named(things, "family of man, girl and girl").gender is None  # there is none without
    assert named(things, "student").gender is None
    assert named(things, "fox").nameable
    assert not any(named(things, name).nameable for name in ("student", "letter A"))
    assert "1f3fb" not in things
    assert len({(thing.object, thing.tone) for thing in things.values()}) == len(things)


def test_captions(things: dict[str, Thing]) -> None:
    fox = captions(named(things, "fox"), "twemoji")
    assert fox[:3] == ["a fox, twemoji style", "a simple flat cartoon of a fox", "fox in twemoji style"]
    assert fox[3] in ("fox, animal, face, twemoji style", "fox, face, animal, twemoji style")
    assert captions(named(things, "man with red hair", "dark"), "mono") == [
        "a man with red hair and dark skin, line icon style",
        "a black line drawing of a man with red hair and dark skin",
        "man with red hair and dark skin in line icon style",
    ]
    assert captions(named(things, "people holding hands", "light"), "blob")[0] == (
        "people holding hands with light skin, blob style"
    )


def test_the_hash_is_the_one_that_is_written_down() -> None:
    assert "SHA-256" in HASH_RULE
    digest = hashlib.sha256(b"test_style\nfox\nnoto").hexdigest()
    assert chance("test_style", "fox", "noto") == int(digest[:12], 16) / 2**48
    assert round(chance("test_object", "fox"), 9) == 0.409959262
    values = [chance("x", str(number)) for number in range(2000)]
    assert 0.47 < sum(values) / 2000 < 0.53
    assert all(0 <= value < 1 for value in values)


def test_codes_and_slugs() -> None:
    assert plain_code("0023-FE0F-20E3") == plain_code("23_20e3") == "23-20e3"
    assert slug("flag: Côte d’Ivoire") == "flag-cote-divoire"
    assert slugs(DATA)["man-student-dark-skin-tone"] == "1f468-1f3ff-200d-1f393"


def test_icons_are_found_by_old_names(things: dict[str, Thing]) -> None:
    codes = slugs(DATA) | {"camel": "1f42b"}
    assert find_code(["fox"], codes, things) == "1f98a"
    assert find_code(["bactrian", "camel"], codes, things) == "1f42b"
    assert find_code(["flag-for-bosnia-and-herzegovina"], codes, things) == ""
    assert find_code(["flag-for-flag-x"], codes | {"flag-x": "1f1e7-1f1e6"}, things) == "1f1e7-1f1e6"
    assert find_code(["graduate-dark-skin-tone"], codes | {"graduate": "1f9d1-200d-1f393"}, things) == (
        "1f9d1-1f3ff-200d-1f393"
    )
    assert find_code(["graduate-medium-dark-skin-tone"], codes, things) == ""


def test_things_drawn_alike_get_one_name(things: dict[str, Thing]) -> None:
    person, man, woman = (named(things, name) for name in ("student", "man student", "woman student"))
    assert merged([person, man]) == man
    assert merged([woman, person, man]) == person
    assert merged([named(things, "student", tone) for tone in (None, *TONES)]) == person
    assert merged([named(things, "fox"), named(things, "letter A")]) == named(things, "letter A")  # older


def some(name: str, **more: Any) -> Thing:
    return Thing(**{"code": slug(name), "object": name, "role": name, "article": "a", "group": "animals-nature",
                    "nameable": True, **more})  # fmt: skip


def grid() -> list[tuple[str, Thing]]:
    """200 animals and 60 people of four tones in every style, 3,520 pictures."""
    made = [some(f"animal {number}") for number in range(200)]
    for number in range(20):
        for gender in (None, "man", "woman"):
            for tone in (None, "light", "medium", "dark"):
                made.append(
                    some(
                        f"{gender or 'person'} {number}",
                        code=f"{gender}-{tone}-{number}",
                        role=f"person {number}",
                        group="people-body",
                        nameable=False,
                        tone=tone,
                        gender=gender,
                    )
                )
    return [(style, thing) for style in STYLES for thing in made]


def of(pictures: Sequence[tuple[str, Thing]], splits: Sequence[str], split: str) -> list[tuple[str, Thing]]:
    return [picture for picture, name in zip(pictures, splits, strict=True) if name == split]


def test_held_out_pairs_are_not_in_training() -> None:
    pictures = grid()
    splits = split_pictures(pictures)
    assert set(splits) == set(SPLITS)
    seen = of(pictures, splits, "train") + of(pictures, splits, "val")
    styles, known = {(thing.object, style) for style, thing in seen}, defaultdict(set)
    for style, thing in of(pictures, splits, "train"):
        known[thing.object].add(style)
    for style, thing in of(pictures, splits, "test_style"):
        assert (thing.object, style) not in styles
        assert len(known[thing.object]) >= 3
    tones = {(thing.object, thing.tone) for _, thing in seen}
    assert not any((thing.object, thing.tone) in tones for _, thing in of(pictures, splits, "test_tone"))
    genders = {(thing.role, thing.gender) for _, thing in seen}
    for _, thing in of(pictures, splits, "test_gender"):
        assert (thing.role, thing.gender) not in genders
        assert {(thing.role, gender) for gender in (None, "man", "woman")} - {
            (thing.role, thing.gender)
        } <= genders
    objects = {thing.object for _, thing in seen}
    for _, thing in of(pictures, splits, "test_object"):
        assert thing.object not in objects
        assert thing.group != "people-body"
    assert 0.06 < len({(t.object, s) for s, t in of(pictures, splits, "test_style")}) / (260 * 8) < 0.14


def test_splits_do_not_depend_on_order_or_on_other_things() -> None:
    pictures = grid()
    splits = dict(zip(pictures, split_pictures(pictures), strict=True))
    assert splits == dict(zip(reversed(pictures), split_pictures(pictures[::-1]), strict=True))
    few = [(style, thing) for style, thing in pictures if thing.object.endswith("7")]
    assert split_pictures(few) == [splits[picture] for picture in few]


def test_an_object_of_few_styles_stays_in_training() -> None:
    pictures = [(style, thing) for style, thing in grid() if style in ("noto", "blob", "mono")]
    assert "test_style" not in split_pictures(pictures)


def test_who_faces_right_is_held_out_with_who_faces_left() -> None:
    left = [picture for picture in grid() if picture[1].group == "people-body"]
    right = [(style, Thing(**{**thing.__dict__, "object": f"{thing.object} facing right",
                              "role": f"{thing.role} facing right", "code": f"r{thing.code}"}))
             for style, thing in left]  # fmt: skip
    splits = split_pictures(left + right)
    for one, other in zip(splits[: len(left)], splits[len(left) :], strict=True):
        assert one == other or {one, other} <= {"train", "val"}


def test_sisters_are_styles_of_one_family() -> None:
    pictures = [picture for picture in grid() if picture[1].object == "animal 5"]
    assert [style for style, _ in pictures] == list(STYLES)
    splits = dict.fromkeys(STYLES, "train") | {"noto": "test_style", "flat": "test_style", "contrast": "val"}
    found = dict(zip(STYLES, sisters(pictures, list(splits.values())), strict=True))
    assert {style for style, sister in found.items() if sister} == {
        "noto",
        "flat",
        "contrast",
        "emojione",
        "mono",
    }


def test_the_table_of_styles() -> None:
    assert list(STYLES) == list(PACKAGES)
    assert len({style.name for style in STYLES.values()} | {style.look for style in STYLES.values()}) == 16


def pack(folder: Path, package: icon_packages.Package, files: dict[str, bytes | Any]) -> None:
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / package.file, "w:gz") as tar:
        for name, content in files.items():
            content = content if isinstance(content, bytes) else json.dumps(content).encode()
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def square(code: str, style: str) -> str:
    """A drawing that no other code and style has."""
    digest = hashlib.sha256(f"{code}{style}".encode()).hexdigest()
    return f'<path d="M1 {int(digest[6:8], 16) % 5}h9v9h-9z" fill="#{digest[:6]}"/>'


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packages of the same form, with 60 animals and one student in every style, and some oddities."""
    folder = tmp_path_factory.mktemp("packages") / "npm"
    data = [*DATA, *(emoji(f"animal {number}", f"1F{0x500 + number:X}") for number in range(60))]
    codes = [plain_code(entry["hexcode"]) for entry in [*data, *DATA[9]["skins"]]]
    pack(folder, NAMES, {"en/data.json": data, "meta/groups.json": GROUPS, "zh/data.json": []})
    for style, package in PACKAGES.items():
        if style == "fluent3d":
            files: dict[str, Any] = {}
            for code in [*codes, "1f91d-1f3fb-200d-1f3fc"]:
                digest = hashlib.sha256(code.encode()).digest()
                image, buffer = Image.new("RGBA", (32, 32)), io.BytesIO()
                image.paste((*digest[:3], 255), (8, 8, 24, 24))
                image.save(buffer, "WEBP", lossless=True)
                files[f"assets/{code.upper().replace('1F553', '1F553-FE0F').lower()}.webp"] = (
                    buffer.getvalue()
                )
        else:
            labels = {code: name for name, code in slugs(data).items() if code in codes}
            icons: dict[str, Any] = {
                labels[code]: {"body": square(code, style)} for code in codes if code in labels
            }
            icons["gone"] = {"body": square("gone", style), "hidden": True}
            icons["nobody-knows"] = {"body": square("?", style)}
            if style == "blob":  # a vendor that draws one student for all, and a name of before
                for name in ("student", "man-student"):
                    icons[name] = {"body": square("student", style)}
                icons["graduate"] = icons.pop("woman-student")
                icons["owl"] = {"body": '<path d="M0 0h16v16h-16z" fill="#fff"/>'}
            aliases = {"woman-student": {"parent": "graduate"}} if style == "blob" else {}
            if style == "twemoji":
                icons["wide"] = icons.pop("paw-prints") | {"height": 8}
                aliases = {"flipped": {"parent": "fox", "hFlip": True}}
            named = {} if style in ("blob", "emojione", "mono") else {code: labels[code] for code in labels}
            if style == "twemoji":
                named |= {"1f43e": "wide", "1f553": "flipped"}
            files = {
                "icons.json": {"icons": icons, "aliases": aliases, "width": 16, "height": 16},
                "chars.json": named,
            }
        pack(folder, package, files)
    return folder


def make(out: Path, packages: Path, size: int = 32, scenes: int = 0, alpha: bool = False) -> list[Progress]:
    pytest.importorskip("resvg_py")
    return list(Icons(size=size, packages=str(packages), scenes=scenes, alpha=alpha).make(out))


@pytest.fixture(scope="module")
def made(packages: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("icons") / "set"
    make(out, packages)
    return out


def images(root: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for split in SPLITS:
        data = json.loads((root / "annotations" / f"captions_{split}.json").read_text(encoding="utf-8"))
        texts = defaultdict(list)
        for note in data["annotations"]:
            texts[note["image_id"]].append(note["caption"])
        for entry in data["images"]:
            path = root / split / entry["file_name"]
            found[entry["file_name"]] = {
                **entry,
                "split": split,
                "captions": texts[entry["id"]],
                "path": path,
            }
    return found


def pixels(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.copy()


def content(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_the_loader_reads_every_split_without_a_warning(made: Path) -> None:
    pictures = 0
    for split in SPLITS:
        file = made / "annotations" / f"captions_{split}.json"
        if not json.loads(file.read_text(encoding="utf-8"))["images"]:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loader = CocoImageLoader(made / split, file)
        pictures += len(loader)
        assert loader[0].image.size == (32, 32)
        assert loader[0].image.mode == "RGB"
    assert pictures == len(images(made)) > 500


def test_pictures_may_keep_the_drawings_transparency(made: Path, packages: Path, tmp_path: Path) -> None:
    """All else is the same, and so is what they look like on white."""
    make(tmp_path / "set", packages, alpha=True)
    clear, found = images(tmp_path / "set"), images(made)
    assert clear.keys() == found.keys()
    for name, entry in clear.items():
        image, (left, top, width, height) = pixels(entry["path"]), entry["things"][0]["box"]
        assert image.mode == "RGBA"
        assert image.getchannel("A").getbbox() == (left, top, left + width, top + height)
        assert to_rgb(image).tobytes() == pixels(found[name]["path"]).tobytes()
        assert entry["captions"] == found[name]["captions"]


def test_pictures_are_named_and_described(made: Path) -> None:
    found = images(made)
    fox = found["noto-fox-1f98a.png"]
    assert {key: fox[key] for key in ("style", "object", "role", "group", "tone", "gender", "code")} == {
        **{"style": "noto", "object": "fox", "role": "fox", "group": "animals-nature"},
        **{"tone": None, "gender": None, "code": "1f98a"},
    }
    assert "a fox, noto style" in fox["captions"]
    assert isinstance(fox["sister"], bool)
    assert fox["style_words"] == ["noto style", "a smooth shaded cartoon"]
    for entry in found.values():
        part = ("sister" if entry["sister"] else "no sister") if entry["split"] == "test_style" else None
        assert entry.get("part") == part
        assert all(any(word in text for word in entry["style_words"]) for text in entry["captions"])
    flags = [image["weight"] for image in found.values() if image["group"] == "flags"]
    roles = Counter(image["role"] for image in found.values() if image["split"] == fox["split"])
    assert fox["weight"] == pytest.approx(roles["fox"] ** -0.5, abs=1e-4), "the square root of its drawings"
    assert max(flags) <= 0.3
    dark = found["flat-student-1f9d1-1f3ff-200d-1f393.png"]
    assert (dark["tone"], dark["object"]) == ("dark", "student")
    assert "fluent3d-clock-at-four-oclock-1f553.png" in found
    assert all(name == name.lower() and len(name) < 120 for name in found)
    assert len({entry["id"] for entry in found.values()}) == len(found)


def test_evaluation_scores_what_it_scored_when_it_knew_styles_and_sisters(made: Path) -> None:
    """The rules of version 2, by which the evaluator knew the icons: the fields of the set say the same now."""
    for name in ("train", "val", "test_style"):
        split = coco_split(made / name, made / "annotations" / f"captions_{name}.json")
        found = {entry["file_name"]: entry for entry in images(made).values() if entry["split"] == name}

        def number(*parts: str) -> int:
            return int.from_bytes(hashlib.sha256("\n".join(("5", *parts)).encode()).digest(), "big")

        order = sorted(found, key=number)
        parts = {name: order}
        if name == "test_style":
            parts = {
                f"test_style, {words}": [file for file in order if found[file]["sister"] is sister]
                for words, sister in (("no sister", False), ("sister", True))
            }
        got = groups(split, 5)
        assert {group.name: [split.entries[row].key for row in group.rows] for group in got} == parts
        assert [group.name for group in got] == list(parts)
        for group in got:
            for row in group.rows:
                file = split.entries[row].key
                style = STYLES[found[file]["style"]]
                words = (f"{style.name} style", style.look)
                named = [text for text in found[file]["captions"] if any(word in text for word in words)]
                assert group.caption(row, 5) == named[number(file, "caption") % len(named)]


def test_oddities_of_the_packages(made: Path) -> None:
    found = images(made)
    assert not any("nobody" in name or "gone" in name or "1f3fb-200d-1f3fc" in name for name in found)
    assert "blob-man-student-1f468-200d-1f393.png" in found  # drawn as the person is
    assert "blob-student-1f9d1-200d-1f393.png" not in found
    assert "blob-woman-student-1f469-200d-1f393.png" in found  # under an alias
    assert "blob-owl-1f989.png" not in found  # blank
    left_out = json.loads((made / "dataset.json").read_text(encoding="utf-8"))["left_out"]
    assert left_out == {
        "a skin tone or hair alone": 8,
        "blank": 1,
        "drawn as another thing of the same style": 1,
        "held out, but equal to a training picture": 0,
        "people of two skin tones": 1,
        "without a name in emojibase": 7,
    }
    wide, fox, flipped = (
        pixels(found[f"twemoji-{name}.png"]["path"])
        for name in ("paw-prints-1f43e", "fox-1f98a", "clock-at-four-oclock-1f553")
    )
    assert wide.getpixel((4, 3)) == (255, 255, 255)  # not stretched
    assert flipped.tobytes() == fox.transpose(Image.Transpose.FLIP_LEFT_RIGHT).tobytes() != fox.tobytes()


def test_no_held_out_picture_equals_a_training_picture(packages: Path, made: Path, tmp_path: Path) -> None:
    drawn = [
        entry
        for entry in images(made).values()
        if "animal" in entry["object"] and entry["style"] != "fluent3d"
    ]
    held = next(entry for entry in drawn if entry["split"] == "test_style")
    train = next(entry for entry in drawn if entry["split"] == "train" and entry["style"] != held["style"])
    folder = tmp_path / "npm"
    folder.mkdir()
    for file in packages.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    package = PACKAGES[held["style"]]
    files = {
        name: json.loads(text)
        for name, text in icon_packages.read(packages / package.file, ["icons", "chars"]).items()
    }
    files["icons.json"]["icons"][slug(held["object"])]["body"] = square(train["code"], train["style"])
    pack(folder, package, files)
    make(tmp_path / "set", folder)
    found = images(tmp_path / "set")
    assert held["file_name"] not in found
    assert found[train["file_name"]]["split"] == "train"
    known = {entry["path"].read_bytes() for entry in found.values() if entry["split"] == "train"}
    assert not any(
        entry["path"].read_bytes() in known for entry in found.values() if entry["split"] != "train"
    )


def test_two_runs_give_the_same_bytes(packages: Path, made: Path, tmp_path: Path) -> None:
    make(tmp_path / "other", packages)
    assert content(tmp_path / "other") == content(made)


def test_scenes_are_part_of_the_set(packages: Path, made: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    steps = make(out, packages, scenes=40)
    assert [step.what for step in steps if step.done == step.total] == [
        *("drawing", "writing", "drawing for scenes", "composing")
    ]
    plain = {name: data for name, data in content(out).items() if "scenes" not in name}
    assert {name for name in content(made) if name.endswith(".png")} <= plain.keys()
    settings = Icons(size=32, scenes=40)
    source = settings.open(out)
    drawings = Icons(size=32, scenes=0).open(out)
    entries, some = source.entries(), drawings.entries()
    assert [entry.key for entry in entries[: len(some)]] == [entry.key for entry in some]
    scenes = entries[len(some) :]
    assert len(scenes) == 40
    assert source.image(scenes[3].key).size == source.image(entries[0].key).size == (32, 32)
    parts = [sum(entry.weight for entry in part) for part in (some, scenes)]
    assert parts[1] / sum(parts) == pytest.approx(0.7, abs=0.01)
    for entry in entries:
        things: Any = entry.fields["things"]
        for thing in things:
            left, top, width, height = thing["box"]
            assert 0 <= left < left + width <= 32
            assert 0 <= top < top + height <= 32
        assert entry.fields["task"] in ("single", "colour", "counting", "two", "position", "binding", "many")
    known = {
        (image["style"], image["object"]) for image in images(made).values() if image["split"] == "train"
    }
    for entry in scenes:
        things = entry.fields["things"]
        assert all((entry.fields["style"], thing["object"]) in known for thing in things)
    said = json.loads((out / "dataset.json").read_text(encoding="utf-8"))["more_splits"]
    for split, about in said.items():
        listed = json.loads((out / "annotations" / f"captions_{split}.json").read_text(encoding="utf-8"))
        assert len(listed["images"]) == len(list((out / split).iterdir())) == about["pictures"] > 0
        assert f"| {split} | {about['pictures']} | {about['rule']} |" in (out / "README.md").read_text()
    make(tmp_path / "again", packages, scenes=40)
    assert content(tmp_path / "again") == content(out)
    assert make(out, packages, scenes=40) == []
    make(out, packages)
    assert not (out / "train_scenes").exists()


def test_held_out_words_ask_for_training_drawings(made: Path) -> None:
    data = json.loads((made / "annotations" / "captions_test_words.json").read_text(encoding="utf-8"))
    assert data["images"]
    for image in data["images"]:
        assert image["task"] == "synonym"
        assert (made / "test_words" / image["file_name"]).read_bytes() == (
            made / "train" / image["file_name"]
        ).read_bytes()
    said = {annotation["caption"] for annotation in data["annotations"]}
    taught = json.loads((made / "annotations" / "captions_train.json").read_text(encoding="utf-8"))
    assert not said & {annotation["caption"] for annotation in taught["annotations"]}


def test_what_the_set_says_of_itself(made: Path) -> None:
    data = json.loads((made / "dataset.json").read_text(encoding="utf-8"))
    found = images(made)
    for split in SPLITS:
        count = sum(entry["split"] == split for entry in found.values())
        assert data["splits"][split]["pictures"] == sum(data["splits"][split]["by_style"].values()) == count
    assert {source["name"] for source in data["sources"]} == {p.name for p in (*PACKAGES.values(), NAMES)}
    assert all(len(source["sha256"]) == 64 for source in data["sources"])
    readme = (made / "README.md").read_text(encoding="utf-8")
    for package in (*PACKAGES.values(), NAMES):
        assert all(
            part in readme for part in (package.credit, package.licence, f"{package.name}@{package.version}")
        )
    assert all(f"{style.name} style; {style.look}" in readme for style in STYLES.values())


def test_a_set_is_left_alone_or_replaced(packages: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    out.mkdir()
    steps = make(out, packages)
    assert [step.what for step in steps if step.done == step.total] == ["drawing", "writing"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set"]
    assert make(out, packages) == []
    make(out, packages, size=16)
    assert {pixels(entry["path"]).size for entry in images(out).values()} == {(16, 16)}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set"]


def test_stopped_early_it_leaves_nothing(packages: Path, tmp_path: Path) -> None:
    pytest.importorskip("resvg_py")
    steps = Icons(size=32, packages=str(packages), scenes=0).make(tmp_path / "set")
    next(steps)
    steps.close()
    assert not any(tmp_path.iterdir())


def test_other_folders_are_not_touched(packages: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="something else than a set of icons"):
        make(tmp_path, packages)
    with pytest.raises(InputError, match="Not a directory"):
        make(tmp_path / "mine.txt", packages)
    with pytest.raises(InputError, match="size must be from 16 to 1024, got 8"):
        make(tmp_path / "set", packages, size=8)
    assert content(tmp_path) == {"mine.txt": b"mine"}


def test_without_resvg(packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(InputError, match=r"pip install 'mini-stable-diffusion\[icons\]'"):
        next(Icons(packages=str(packages)).make(tmp_path / "set"))


def test_without_npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="the command npm was not found: install Node"):
        make(tmp_path / "set", tmp_path / "npm")
    assert not any(tmp_path.iterdir())


@pytest.mark.skipif(os.name == "nt", reason="the fake npm is a shell script")
def test_npm_fetches_what_is_not_there(
    packages: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    npm = tmp_path / "npm"
    npm.write_text(f'#!/bin/sh\necho "$2" >> "{tmp_path}/asked"\ncp "{packages}"/*.tgz "$4"\n')
    npm.chmod(npm.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.chdir(tmp_path)
    kept = Path("kept")
    steps = make(Path("set"), kept)
    assert [(step.done, step.total) for step in steps if step.what == "fetching"] == [
        (n, 9) for n in range(10)
    ]
    asked = (tmp_path / "asked").read_text().split()
    assert asked == [f"{package.name}@{package.version}" for package in (*PACKAGES.values(), NAMES)]
    assert sorted(path.name for path in kept.iterdir()) == sorted(
        package.file for package in (*PACKAGES.values(), NAMES)
    )
    assert content(Path("set")) == content(made)
    (kept / NAMES.file).unlink()
    make(Path("again"), kept)
    assert (tmp_path / "asked").read_text().split()[9:] == [f"{NAMES.name}@{NAMES.version}"]


@pytest.mark.skipif(os.name == "nt", reason="the fake npm is a shell script")
@pytest.mark.parametrize("prefix", ["npm error", "npm ERR!"])
def test_a_package_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefix: str) -> None:
    npm = tmp_path / "npm"
    lines = ("code E404", "syscall open", "404 No match found")
    npm.write_text("#!/bin/sh\n" + "".join(f'echo "{prefix} {line}" >&2\n' for line in lines) + "exit 1\n")
    npm.chmod(npm.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(
        InputError, match=r"npm cannot fetch @lobehub/fluent-emoji-3d@\S+ \(404 No match found\)"
    ):
        make(tmp_path / "set", tmp_path / "kept")
    assert not (tmp_path / "set").exists()
    assert not any((tmp_path / "kept").iterdir())


@pytest.mark.parametrize("damage", ["cut", "empty", "other"])
def test_a_damaged_package(packages: Path, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "npm"
    folder.mkdir()
    for file in packages.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    bad = folder / PACKAGES["noto"].file
    if damage == "other":
        pack(folder, PACKAGES["noto"], {"index.js": b"{}"})
    else:
        bad.write_bytes(bad.read_bytes()[: 300 if damage == "cut" else 0])
    with pytest.raises(InputError, match=r"noto-\S+.tgz .*: delete it, and it is fetched again"):
        make(tmp_path / "set", folder)
    assert not (tmp_path / "set").exists()


@pytest.mark.network
@pytest.mark.slow
def test_the_real_packages(tmp_path: Path) -> None:
    pytest.importorskip("resvg_py")
    out = tmp_path / "set"
    assert {step.what for step in Icons(size=64).make(out)} == {"fetching", "drawing", "writing"}
    found = images(out)
    assert len(found) > 19_000
    assert {entry["style"] for entry in found.values()} == set(STYLES)
    named: dict[tuple[str, str | None], str] = {}
    for entry in found.values():
        assert named.setdefault((entry["object"], entry["tone"]), entry["code"]) == entry["code"]
    known = {pixels(e["path"]).tobytes() for e in found.values() if e["split"] == "train"}
    assert not any(pixels(e["path"]).tobytes() in known for e in found.values() if e["split"] != "train")


@pytest.mark.parametrize(
    "damage", [b"[]", b"{}", b"7", b"[" * 100_000, b'[{"label": 3, "hexcode": "1F98A"}]']
)
def test_packages_that_hold_something_else_are_one_sentence(tmp_path: Path, damage: bytes) -> None:
    for package in (*PACKAGES.values(), NAMES):
        with tarfile.open(tmp_path / package.file, "w:gz") as tar:
            for name in ("icons.json", "chars.json", "en/data.json", "meta/groups.json"):
                entry = tarfile.TarInfo(f"package/{name}")
                entry.size = len(damage)
                tar.addfile(entry, io.BytesIO(damage))
    with pytest.raises(InputError, match="hold something else than expected") as caught:
        icon_packages.all_drawings(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", [b"", b"RIFF", "<svg", '<svg xmlns="http://www.w3.org/2000/svg"/'])
def test_a_damaged_drawing_is_one_sentence(source: str | bytes) -> None:
    with pytest.raises(InputError, match="a drawing in a package"):
        icon_packages.draw(source, 16)
