"""The set of icons in COCO's format: thousands of named things, drawn by several vendors, from npm packages.

The packages are fetched once through the ``npm`` client and drawn here, on white or with their transparency;
object and style (and skin tone, and gender) make a grid, of which ``icon_splits`` holds parts out.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import tempfile
from collections import Counter, defaultdict
from collections.abc import Generator, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from stable_diffusion.data.icon_captions import STYLES, Thing, captions, chance, slug, style_words
from stable_diffusion.data.icon_packages import NAMES, PACKAGES, Drawing, all_drawings, draw, fetch
from stable_diffusion.data.icon_phrases import WORDS_RULE, held_out, more_captions
from stable_diffusion.data.icon_splits import HASH_RULE, PARTED, SPLITS, sisters, split_pictures
from stable_diffusion.data.icon_studio import RULES, TEST_SCENES, numbers, write_scenes
from stable_diffusion.data.item import Progress
from stable_diffusion.data.made import Captioned, make_set, write_captions
from stable_diffusion.errors import InputError
from stable_diffusion.files import write_json
from stable_diffusion.images import to_rgb

SIGN_WEIGHT = 0.3  # of flags, letters and numbers, which are a quarter of the things and no use in pictures

ALL_SPLITS = {**SPLITS, "test_words": WORDS_RULE}
"""The splits of drawings and their rules."""


class Row(NamedTuple):
    """A picture of the set."""

    style: str
    thing: Thing
    split: str
    sister: bool
    """Whether training holds a sister of it."""


_DESCRIPTION = "mini-stable-diffusion icons"
_VERSION = 5  # grows with every change of pictures, captions, fields, splits or weights


def write_icons(
    out: Path, size: int, packages: Path | None, scenes: int = 0, alpha: bool = False
) -> Generator[Progress, None, None]:
    """Makes ``{split}/``, ``annotations/captions_{split}.json``, README.md and dataset.json, as it is consumed.

    The same bytes every time; closed early, it leaves nothing. In the JSON files each image also has ``style``,
    ``style_words`` (of which its captions have one), ``object``, ``role`` (the object without its gender),
    ``group``, ``tone``, ``gender``, ``code``; ``weight``: how often training samples it, relative to the others,
    so that people, of whom there are most drawings, do not fill half of it; and ``sister``: whether training
    holds the object in another style of the same family (``STYLES``), by which ``part`` parts ``test_style``.

    Args:
        out: a folder that is empty, new, or such a set, which is left as it is if it was made of the same.
        size: side of the pictures in pixels.
        packages: a folder where the packages' archives are kept; those that are not there yet are fetched into
            it. None keeps none.
        scenes: how many to compose for training; where there are any, up to ``TEST_SCENES`` of each split of scenes.
        alpha: whether drawings, and scenes without a ground, stay transparent.

    Raises:
        InputError: npm or resvg-py is missing, a package cannot be had or read, or ``out`` holds something else or
            cannot be written.
    """
    info = _info(size, scenes) | ({"alpha": True} if alpha else {})

    def fill(root: Path) -> Iterator[Progress]:
        with tempfile.TemporaryDirectory(dir=root) as workshop:
            archives = Path(workshop, "packages") if packages is None else packages
            yield from fetch(archives)
            yield from _make(root, Path(workshop), archives, size, scenes, info)

    yield from make_set(out, "icons", info, ("dataset.json", "README.md"), fill)


def _info(size: int, scenes: int) -> dict[str, Any]:
    """What a set is made of. Raises InputError if what draws it is missing."""
    try:
        import resvg_py
    except ImportError as error:
        raise InputError(
            "the icons are drawn by resvg-py, which is not installed: pip install 'mini-stable-diffusion[icons]'"
        ) from error
    return {
        "description": _DESCRIPTION,
        "version": _VERSION,
        "size": size,
        "scenes": scenes,
        "packages": {package.name: package.version for package in (*PACKAGES.values(), NAMES)},
        "drawn_with": {"resvg-py": resvg_py.__version__, "pillow": version("pillow")},
    }


def _make(
    out: Path, drawn: Path, archives: Path, size: int, scenes: int, info: dict[str, Any]
) -> Iterator[Progress]:
    """Draws everything, sorts it into splits, and writes the set."""
    found, left_out = all_drawings(archives)
    alike: dict[tuple[str, str], list[Drawing]] = defaultdict(list)  # by style and pixels
    boxes: dict[str, list[int]] = {}
    for number, drawing in enumerate(found):
        if number % 50 == 0:
            yield Progress("drawing", number, len(found))
        transparent = draw(drawing.source, size)
        image = to_rgb(transparent)
        if image.getextrema() == ((255, 255),) * 3:
            left_out["blank"] += 1
            continue
        name = _file(drawing.style, drawing.thing)
        (transparent if info.get("alpha") else image).save(drawn / name, "PNG", compress_level=6)
        left, top, right, bottom = transparent.getchannel("A").getbbox() or (0, 0, size, size)
        boxes[name] = [left, top, right - left, bottom - top]
        alike[drawing.style, hashlib.sha256(image.tobytes()).hexdigest()].append(drawing)
    yield Progress("drawing", len(found), len(found))

    pixels = {(style, merged([d.thing for d in group])): digest for (style, digest), group in alike.items()}
    pictures = sorted(pixels, key=lambda picture: (list(STYLES).index(picture[0]), picture[1].code))
    splits = split_pictures(pictures)
    known = {pixels[picture] for picture, split in zip(pictures, splits, strict=True) if split == "train"}
    kept = [
        Row(*picture, split, sister)
        for picture, split, sister in zip(pictures, splits, sisters(pictures, splits), strict=True)
        if split == "train" or pixels[picture] not in known
    ]
    left_out["drawn as another thing of the same style"] = sum(map(len, alike.values())) - len(pictures)
    left_out["held out, but equal to a training picture"] = len(pictures) - len(kept)
    rows = {split: [row for row in enumerate(kept) if row[1].split == split] for split in SPLITS}
    rows["test_words"] = _in_other_words(rows["train"])
    yield Progress("writing", 0, len(rows))
    weight = 0.0
    for done, (split, some) in enumerate(rows.items(), 1):
        written = _write_split(out, drawn, split, some, boxes, size, info)
        weight += written if split == "train" else 0.0
        yield Progress("writing", done, len(rows))
    words = {"test_words": {"rule": WORDS_RULE, "pictures": len(rows["test_words"])}}
    if scenes:
        sources = [
            (row.style, row.thing, alike[row.style, pixels[row[:2]]][0].source) for _, row in rows["train"]
        ]
        yield from write_scenes(out, drawn / "sprites", sources, scenes, size, weight, info)
        words |= {
            split: {"rule": RULES[split], "pictures": number} for split, number in numbers(scenes).items()
        }
    _describe(out, kept, words, info, left_out, archives)


def _in_other_words(rows: Sequence[tuple[int, Row]]) -> list[tuple[int, Row]]:
    """Training drawings whose object has words that training never says, one of each, up to ``TEST_SCENES``."""
    chosen: dict[str, tuple[int, Row]] = {}
    for number, row in sorted(rows, key=lambda one: chance("test_words", one[1].style, one[1].thing.code)):
        if row.thing.nameable and row.thing.tone is None and held_out(row.thing.object):
            chosen.setdefault(row.thing.object, (number, row._replace(split="test_words")))
    among = sorted(chosen, key=lambda name: chance("test_words", "object", name))[:TEST_SCENES]
    return [chosen[name] for name in among]


def merged(things: Sequence[Thing]) -> Thing:
    """The one name of several things that a vendor draws alike.

    Without a skin tone rather than with one; of man and person the man, as the drawing shows one, but of man and
    woman the person; then what has been an emoji for longest.
    """
    genders = {thing.gender for thing in things} - {None}
    gender = next(iter(genders)) if len(genders) == 1 else None
    return min(things, key=lambda one: (one.tone is not None, one.gender != gender, one.order, one.code))


def _file(style: str, thing: Thing) -> str:
    return f"{style}-{slug(thing.object)[:40].strip('-') or 'sign'}-{slug(thing.code)}.png"


def _write_split(
    out: Path,
    drawn: Path,
    split: str,
    rows: Sequence[tuple[int, Row]],
    boxes: Mapping[str, list[int]],
    size: int,
    info: dict[str, Any],
) -> float:
    """Writes pictures and captions; returns the sum of their weights."""
    (out / split).mkdir()
    licences = {package.licence: package.url for package in PACKAGES.values()}
    roles = Counter(thing.role for _, (_, thing, _, _) in rows)
    pictures: Captioned = []
    total = 0.0
    for number, (style, thing, _, sister) in rows:
        name, weight = _file(style, thing), round(_weight(thing, roles[thing.role]), 4)
        if split == "test_words":
            shutil.copy(out / "train" / name, out / split / name)
            said = more_captions(thing, style, others=True)
        else:
            (drawn / name).replace(out / split / name)
            said = [*captions(thing, style), *more_captions(thing, style)]
        image = {
            "id": number,
            "file_name": name,
            "width": size,
            "height": size,
            "license": list(licences).index(PACKAGES[style].licence) + 1,
            "style": style,
            "style_words": list(style_words(style)),
            **{key: getattr(thing, key) for key in ("object", "role", "group", "tone", "gender", "code")},
            "sister": sister,
            "task": "synonym" if split == "test_words" else "single",
            "things": [{"object": thing.object, "colour": None, "box": boxes[name]}],
            **({"part": "sister" if sister else "no sister"} if split == PARTED else {}),
            "weight": weight,
        }
        pictures.append((image, said))
        total += weight
    named = [{"id": i, "name": name, "url": url} for i, (name, url) in enumerate(licences.items(), 1)]
    write_captions(out, split, info | {"split": split, "rule": ALL_SPLITS[split]}, pictures, licenses=named)
    return total


def _weight(thing: Thing, drawings: int) -> float:
    """How often training samples one of the `drawings` of a role: people have a hundred, most things have eight."""
    # Flags, letters and numbers are many, and each is alone.
    sign = not thing.nameable and thing.group != "people-body"
    return (SIGN_WEIGHT if sign else 1.0) / math.sqrt(drawings)


def _describe(
    out: Path,
    rows: Sequence[Row],
    more: Mapping[str, dict[str, Any]],
    info: dict[str, Any],
    left_out: Mapping[str, int],
    archives: Path,
) -> None:
    """Writes dataset.json and README.md."""
    counts = Counter((split, style) for style, _, split, _ in rows)
    table = {split: {style: counts[split, style] for style in STYLES} for split in SPLITS}
    sources = {**PACKAGES, "names": NAMES}
    data = {
        "info": info,
        "splits": {
            split: {
                "rule": SPLITS[split],
                "pictures": sum(table[split].values()),
                "of_these_with_sister": sum(row[2] == split and row[3] for row in rows),
                "objects": len({row[1].object for row in rows if row[2] == split}),
                "by_style": table[split],
            }
            for split in SPLITS
        },
        "more_splits": more,
        "hash_rule": HASH_RULE,
        "left_out": dict(sorted(left_out.items())),
        "styles": {key: {**style._asdict(), "source": PACKAGES[key].name} for key, style in STYLES.items()},
        "sources": [
            package._asdict() | {"sha256": hashlib.sha256((archives / package.file).read_bytes()).hexdigest()}
            for package in sources.values()
        ],
    }
    write_json(out / "dataset.json", data)
    lines = [
        "# Icons",
        "",
        f"{len(rows)} pictures of {info['size']}x{info['size']} pixels: named things, each drawn by several vendors. "
        f"{len({row[1].object for row in rows})} objects, {len(STYLES)} styles. Made by `minisd data icons`; "
        "numbers and versions are also in `dataset.json`.",
        "",
        "| style | in captions | pictures | of them for training |",
        "|---|---|---|---|",
    ]
    for key, style in STYLES.items():
        total = sum(table[split][key] for split in SPLITS)
        lines.append(f"| {key} | {style.name} style; {style.look} | {total} | {table['train'][key]} |")
    lines += ["", "## Splits", "", "| split | pictures | what it holds |", "|---|---|---|"]
    lines += [f"| {split} | {sum(table[split].values())} | {SPLITS[split]} |" for split in SPLITS]
    lines += [f"| {split} | {said['pictures']} | {said['rule']} |" for split, said in more.items()]
    lines += ["", f"{HASH_RULE} A picture that several rules hold belongs to the last of them in the table."]
    lines += ["", "Left out:", "", *(f"- {count} drawings: {why}" for why, count in sorted(left_out.items()))]
    lines += ["", "## Sources, licences and credits", ""]
    lines += [
        "The pictures are changed from their sources: drawn as pixels, on white. Who passes them on must pass on "
        "these credits, too.",
        "",
    ]
    for key, package in sources.items():
        lines.append(
            f"- {key}: {package.credit}. [{package.licence}]({package.url}). npm `{package.name}@{package.version}`"
        )
    (out / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
