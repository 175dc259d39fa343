"""The set of icons in COCO's format: thousands of named things, drawn by several vendors, from npm packages.

The packages are fetched once through the ``npm`` client and drawn here, on white; object and style (and skin
tone, and gender) make a grid, of which ``icon_splits`` holds parts out.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import tarfile
import tempfile
from collections import Counter, defaultdict
from collections.abc import Generator, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from stable_diffusion.data.icon_captions import (
    STYLES,
    TONES,
    Thing,
    captions,
    plain_code,
    read_things,
    slug,
    slugs,
)
from stable_diffusion.data.icon_splits import HASH_RULE, SPLITS, sisters, split_pictures
from stable_diffusion.errors import InputError
from stable_diffusion.images import to_rgb

_DESCRIPTION = "mini-stable-diffusion icons, version 1"


class Package(NamedTuple):
    """A package of npm's registry, and whose work it holds."""

    name: str
    version: str
    licence: str
    url: str
    """Of the licence."""
    credit: str

    @property
    def file(self) -> str:
        """The archive's name, as ``npm pack`` gives it."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


_FLUENT = ("MIT", "https://github.com/microsoft/fluentui-emoji/blob/main/LICENSE")
_NOTO = ("Apache-2.0", "https://github.com/googlefonts/noto-emoji/blob/main/LICENSE")
_CC_BY = ("CC-BY-4.0", "https://creativecommons.org/licenses/by/4.0/")

PACKAGES: dict[str, Package] = {
    "fluent3d": Package(
        "@lobehub/fluent-emoji-3d", "1.1.0", *_FLUENT, "Fluent Emoji, by Microsoft Corporation"
    ),
    "flat": Package(
        "@iconify-json/fluent-emoji-flat", "1.2.6", *_FLUENT, "Fluent Emoji, by Microsoft Corporation"
    ),
    "contrast": Package(
        "@iconify-json/fluent-emoji-high-contrast", "1.2.6", *_FLUENT, "Fluent Emoji, by Microsoft Corporation"
    ),
    "noto": Package("@iconify-json/noto", "1.2.9", *_NOTO, "Noto Emoji, by Google Inc"),
    "blob": Package("@iconify-json/noto-v1", "1.2.5", *_NOTO, "Noto Emoji (version 1), by Google Inc"),
    "twemoji": Package(
        "@iconify-json/twemoji", "1.2.5", *_CC_BY, "Twemoji, by Twitter, Inc and other contributors"
    ),
    "emojione": Package("@iconify-json/emojione", "1.2.3", *_CC_BY, "EmojiOne 2, by EmojiOne (EmojiTwo)"),
    "mono": Package(
        "@iconify-json/emojione-monotone", "1.2.1", *_CC_BY, "EmojiOne 2, by EmojiOne (EmojiTwo)"
    ),
}
"""Where each style's drawings come from."""

NAMES = Package(
    *("emojibase-data", "17.0.0", "MIT"),
    *("https://github.com/milesj/emojibase/blob/master/LICENSE", "names and keywords: Emojibase, by Miles Johnson"),
)


class Progress(NamedTuple):
    """How far the making of a set has come."""

    what: str
    """"fetching", "drawing" or "writing"."""
    done: int
    total: int


class _Drawing(NamedTuple):
    """One drawing of a package, not drawn yet."""

    style: str
    thing: Thing
    source: str | bytes
    """SVG, or a file's bytes."""


def write_icons(
    out: str | Path, size: int = 128, *, packages: str | Path | None = None
) -> Generator[Progress, None, Path]:
    """Makes the set and returns ``out``: ``{split}/``, ``annotations/captions_{split}.json``, README.md, dataset.json.

    The same bytes every time. The work is done as the generator is consumed; closed early, it leaves nothing.
    A set that is there already and was made of the same is left as it is, one made of others is replaced. In
    the JSON files each image also has ``style``, ``object``, ``role`` (the object without its gender),
    ``group``, ``tone``, ``gender``, ``code``, and ``sister``: whether training holds the object in another style
    of the same family (``STYLES``).

    Args:
        out: a folder that is empty, new, or such a set.
        size: side of the pictures in pixels, 16 to 1024.
        packages: a folder where the packages' archives are kept; those that are not there yet are fetched into
            it. None keeps none.

    Raises:
        InputError: npm or resvg-py is missing, a package cannot be had or read, ``out`` holds something else or
            cannot be written, or the size is out of range.
    """
    out = Path(out)
    if not 16 <= size <= 1024:
        raise InputError(f"the pictures' size must be 16 to 1024 pixels, got {size}")
    info = _info(size)
    if out.exists() and not out.is_dir():
        raise InputError(f"{str(out)!r} is a file: give a folder")
    if out.is_dir() and any(out.iterdir()):
        there = _there(out)
        if there.get("description") != _DESCRIPTION:
            raise InputError(
                f"{str(out)!r} holds something else than a set of icons: give an empty or a new folder"
            )
        if there == info:
            return out
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as partial:
            archives = Path(partial, "packages") if packages is None else Path(packages)
            yield from _fetch(archives)
            made = Path(partial, "set")
            yield from _make(made, archives, size, info)
            if out.exists():
                out.replace(Path(partial, "old"))
            made.replace(out)
    except OSError as error:
        raise InputError(
            f"cannot write {str(out)!r}: {error.strerror or error}; choose another place"
        ) from error
    return out


def _info(size: int) -> dict[str, Any]:
    """What a set is made of. Raises InputError if what draws it is missing."""
    try:
        import resvg_py
    except ImportError as error:
        raise InputError(
            "the icons are drawn by resvg-py, which is not installed: pip install 'mini-stable-diffusion[icons]'"
        ) from error
    return {
        "description": _DESCRIPTION,
        "size": size,
        "packages": {package.name: package.version for package in (*PACKAGES.values(), NAMES)},
        "drawn_with": {"resvg-py": resvg_py.__version__, "pillow": version("pillow")},
    }


def _there(out: Path) -> dict[str, Any]:
    """What the set in the folder was made of; empty if it is no such set."""
    try:
        return dict(json.loads((out / "dataset.json").read_text(encoding="utf-8"))["info"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _fetch(folder: Path) -> Iterator[Progress]:
    """Fetches the archives that the folder lacks."""
    wanted = [*PACKAGES.values(), NAMES]
    missing = [package for package in wanted if not (folder / package.file).is_file()]
    if not missing:
        return
    npm = shutil.which("npm")
    if npm is None:
        raise InputError(
            "the icons come as npm packages, and the command npm was not found: install Node.js (nodejs.org), "
            "or your system's package npm"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for done, package in enumerate(missing):
        yield Progress("fetching", done, len(missing))
        with tempfile.TemporaryDirectory(prefix=".npm-", dir=folder) as arriving:
            command = [npm, "pack", f"{package.name}@{package.version}", "--pack-destination", arriving]
            command += ["--ignore-scripts", "--loglevel=error"]
            run = subprocess.run(
                command, cwd=arriving, capture_output=True, encoding="utf-8", errors="replace", check=False
            )
            file = Path(arriving, package.file)
            if run.returncode or not file.is_file():
                reasons = [line for line in run.stderr.splitlines() if " code " not in line and line.strip()]
                why = reasons[0].removeprefix("npm error").strip() if reasons else f"exit code {run.returncode}"
                raise InputError(
                    f"npm cannot fetch {package.name}@{package.version} ({why}): check the connection, and "
                    "`npm config get registry`"
                )
            file.replace(folder / package.file)
    yield Progress("fetching", len(missing), len(missing))


def _read(archive: Path, wanted: Sequence[str]) -> dict[str, bytes]:
    """The files of an npm archive whose names begin with one of ``wanted``, by their names in the package."""
    try:
        with tarfile.open(archive, "r:gz") as tar:
            files = {}
            for member in tar:
                name = member.name.partition("/")[2]
                if member.isfile() and name.startswith(tuple(wanted)):
                    stream = tar.extractfile(member)
                    assert stream is not None  # it is a file
                    files[name] = stream.read()
            return files
    except (tarfile.TarError, EOFError, OSError) as error:
        raise InputError(f"{archive} is damaged ({error}): delete it, and it is fetched again") from error


def _make(out: Path, archives: Path, size: int, info: dict[str, Any]) -> Iterator[Progress]:
    """Draws everything, sorts it into splits, and writes the set."""
    names = _read(archives / NAMES.file, ["en/data.json", "meta/groups.json"])
    data = json.loads(names["en/data.json"])
    things, two_tones = read_things(data, json.loads(names["meta/groups.json"]))
    drawings, unnamed = _drawings(archives, things, slugs(data))

    drawn = out / "drawn"
    drawn.mkdir(parents=True)
    alike: dict[tuple[str, str], list[_Drawing]] = defaultdict(list)  # by style and pixels
    for number, drawing in enumerate(drawings):
        if number % 50 == 0:
            yield Progress("drawing", number, len(drawings))
        image = _draw(drawing.source, size)
        if image.getextrema() == ((255, 255),) * 3:
            unnamed += 1
            continue
        image.save(drawn / _file(drawing.style, drawing.thing), "PNG", compress_level=6)
        alike[drawing.style, hashlib.sha256(image.tobytes()).hexdigest()].append(drawing)
    yield Progress("drawing", len(drawings), len(drawings))

    pixels = {(style, merged([d.thing for d in group])): digest for (style, digest), group in alike.items()}
    pictures = sorted(pixels, key=lambda picture: (list(STYLES).index(picture[0]), picture[1].code))
    splits = split_pictures(pictures)
    known = {pixels[picture] for picture, split in zip(pictures, splits, strict=True) if split == "train"}
    kept = [
        (*picture, split, sister)
        for picture, split, sister in zip(pictures, splits, sisters(pictures, splits), strict=True)
        if split == "train" or pixels[picture] not in known
    ]
    left_out = {
        "of no name in emojibase, or blank": unnamed,
        "equal to another of the same style": sum(map(len, alike.values())) - len(pictures),
        "held out, and equal to a training picture": len(pictures) - len(kept),
    }
    yield Progress("writing", 0, len(SPLITS))
    for done, split in enumerate(SPLITS, 1):
        _write_split(out, split, [row for row in enumerate(kept) if row[1][2] == split], size, info)
        yield Progress("writing", done, len(SPLITS))
    shutil.rmtree(drawn)
    _describe(out, kept, info, left_out, archives)


def merged(things: Sequence[Thing]) -> Thing:
    """The one name of several things that a vendor draws alike.

    Without a skin tone rather than with one; of man and person the man, as the drawing shows one, but of man and
    woman the person; then what has been an emoji for longest.
    """
    genders = {thing.gender for thing in things} - {None}
    gender = next(iter(genders)) if len(genders) == 1 else None
    return min(things, key=lambda thing: (thing.tone is not None, thing.gender != gender, thing.order, thing.code))


def _drawings(
    archives: Path, things: Mapping[str, Thing], labels: Mapping[str, str]
) -> tuple[list[_Drawing], int]:
    """All drawings that have a name, in order, and the number of those that have none."""
    unnamed = 0
    sets: dict[str, tuple[dict[str, Any], dict[str, str]]] = {}
    found: dict[tuple[str, str], _Drawing] = {}
    codes = dict(labels)
    for style, package in PACKAGES.items():
        archive = archives / package.file
        files = _read(archive, ["assets/", "icons.json", "chars.json"])
        for name in sorted(files):
            if name.startswith("assets/"):
                code = plain_code(Path(name).stem)
                if code in things:
                    found[style, code] = _Drawing(style, things[code], files[name])
                elif not _of_two_tones(code):
                    unnamed += 1
        if "icons.json" in files:
            chars = {name: plain_code(code) for code, name in json.loads(files["chars.json"]).items()}
            sets[style] = json.loads(files["icons.json"]), chars
            for name in sorted(chars):
                codes.setdefault(name, chars[name])
    for style, (icons, chars) in sets.items():
        aliases: dict[str, list[str]] = defaultdict(list)
        for alias, entry in icons.get("aliases", {}).items():
            aliases[entry["parent"]].append(alias)
        for name, svg in sorted(_svgs(icons).items()):
            if name in chars:
                code = chars[name]
            else:
                code = find_code([name, *sorted(aliases[name])], codes, things)
            if code in things:
                found.setdefault((style, code), _Drawing(style, things[code], svg))
            elif not _of_two_tones(code):
                unnamed += 1
    return [found[key] for key in sorted(found)], unnamed


def find_code(names: Sequence[str], codes: Mapping[str, str], things: Mapping[str, Thing]) -> str:
    """The code of an icon by the names it goes under, of any year of Unicode's; empty if none is known."""
    for name in names:
        for spelling in _spellings(name):
            if codes.get(spelling) in things:
                return codes[spelling]
    for name in names:
        for number, tone in enumerate(TONES):
            base = name.removesuffix(f"-{tone}-skin-tone")
            if base != name:
                first, *rest = find_code([base], codes, things).split("-")
                code = "-".join([first, f"{0x1F3FB + number:x}", *rest])
                if code in things and things[code].tone == tone:
                    return code
    return ""


def _spellings(name: str) -> Iterator[str]:
    name = _OLD_NAMES.get(name, name)
    yield name
    for prefix in ("flag-for-flag-", "flag-for-"):
        if name.startswith(prefix):
            yield "flag-" + _OLD_COUNTRIES.get(name.removeprefix(prefix), name.removeprefix(prefix))
            yield name.removeprefix(prefix)
    yield name.replace("cat-face", "cat")
    yield f"{name}-blood-type"


def _of_two_tones(code: str) -> bool:
    return len({point for point in code.split("-") if point in _TONE_POINTS}) > 1


def _svgs(icons: dict[str, Any]) -> dict[str, str]:
    """The drawings of an ``icons.json``, mirrored aliases included; those of its past are hidden."""
    svgs = {}
    for name, icon in icons["icons"].items():
        if not icon.get("hidden"):
            svgs[name] = _svg({**icons, **icon}, icon["body"])
    for name, alias in icons.get("aliases", {}).items():
        parent = icons["icons"].get(alias["parent"])
        if parent is not None and alias.get("hFlip") and not alias.get("hidden"):
            icon = {**icons, **parent, **alias}
            width = icon.get("left", 0) * 2 + icon.get("width", 16)
            svgs[name] = _svg(icon, f'<g transform="matrix(-1 0 0 1 {width} 0)">{parent["body"]}</g>')
    return svgs


def _svg(icon: dict[str, Any], body: str) -> str:
    box = " ".join(
        str(icon.get(key, default)) for key, default in {"left": 0, "top": 0, "width": 16, "height": 16}.items()
    )
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {spaces} viewBox="{box}" width="{{size}}" height="{{size}}">{body}</svg>'


def _draw(source: str | bytes, size: int) -> Image.Image:
    """The drawing as RGB on white, fitted into a square."""
    if isinstance(source, bytes):
        with Image.open(io.BytesIO(source)) as image:
            return to_rgb(image).resize((size, size), Image.Resampling.LANCZOS)
    import resvg_py

    svg = source.replace("{size}", str(size), 2)
    png = resvg_py.svg_to_bytes(svg_string=svg, background="#ffffff", skip_system_fonts=True)
    with Image.open(io.BytesIO(png)) as image:
        return image.convert("RGB")


def _file(style: str, thing: Thing) -> str:
    return f"{style}-{slug(thing.object)[:40].strip('-') or 'sign'}-{thing.code}.png"


Row = tuple[str, Thing, str, bool]
"""A picture's style, thing and split, and whether training holds a sister of it."""


def _write_split(
    out: Path, split: str, rows: Sequence[tuple[int, Row]], size: int, info: dict[str, Any]
) -> None:
    (out / split).mkdir()
    (out / "annotations").mkdir(exist_ok=True)
    licences = {package.licence: package.url for package in PACKAGES.values()}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, (style, thing, _, sister) in rows:
        name = _file(style, thing)
        (out / "drawn" / name).replace(out / split / name)
        images.append(
            {
                "id": number,
                "file_name": name,
                "width": size,
                "height": size,
                "license": list(licences).index(PACKAGES[style].licence) + 1,
                "style": style,
                **{key: getattr(thing, key) for key in ("object", "role", "group", "tone", "gender", "code")},
                "sister": sister,
            }
        )
        for nth, caption in enumerate(captions(thing, style)):
            annotations.append({"id": number * 10 + nth, "image_id": number, "caption": caption})
    data = {
        "info": info | {"split": split, "rule": SPLITS[split]},
        "licenses": [
            {"id": number, "name": name, "url": url} for number, (name, url) in enumerate(licences.items(), 1)
        ],
        "images": images,
        "annotations": annotations,
    }
    _write_json(out / "annotations" / f"captions_{split}.json", data)


def _describe(
    out: Path, rows: Sequence[Row], info: dict[str, Any], left_out: dict[str, int], archives: Path
) -> None:
    """Writes dataset.json and README.md."""
    counts = Counter((split, style) for style, _, split, _ in rows)
    table = {split: {style: counts[split, style] for style in STYLES} for split in SPLITS}
    sources = {
        **{style: PACKAGES[style] for style in STYLES},
        "names": NAMES,
    }
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
        "hash_rule": HASH_RULE,
        "left_out": left_out,
        "styles": {key: {**style._asdict(), "source": PACKAGES[key].name} for key, style in STYLES.items()},
        "sources": [
            package._asdict() | {"sha256": hashlib.sha256((archives / package.file).read_bytes()).hexdigest()}
            for package in sources.values()
        ],
    }
    _write_json(out / "dataset.json", data)
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
    lines += ["", f"{HASH_RULE} A picture that several rules hold belongs to the last of them in the table."]
    lines += ["", "Left out:", ""]
    lines += [f"- {count} drawings: {reason}" for reason, count in left_out.items()]
    lines += [
        "- people of two different skin tones, and the skin tones and hair that are emoji of their own",
        "",
        "## Sources, licences and credits",
        "",
        "The pictures are changed from their sources: drawn as pixels, on white. Who passes them on must pass on "
        "these credits, too.",
        "",
    ]
    for key, package in sources.items():
        lines.append(
            f"- {key}: {package.credit}. [{package.licence}]({package.url}). npm `{package.name}@{package.version}`"
        )
    (out / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")


_TONE_POINTS = {f"{0x1F3FB + number:x}" for number in range(len(TONES))}
# Names of before Unicode renamed them, where a drawing shows what the new name says.
_OLD_NAMES = {
    "blond-haired-person": "person-blond-hair",
    "bride-with-veil": "woman-with-veil",
    "direct-hit": "bullseye",
    "dizzy-face": "face-with-crossed-out-eyes",
    "exclamation-mark": "red-exclamation-mark",
    "heavy-heart-exclamation": "heart-exclamation",
    "man-and-woman-holding-hands": "woman-and-man-holding-hands",
    "man-in-suit-levitating": "person-in-suit-levitating",
    "man-with-chinese-cap": "person-with-skullcap",
    "question-mark": "red-question-mark",
    "robot-face": "robot",
    "two-men-holding-hands": "men-holding-hands",
    "two-women-holding-hands": "women-holding-hands",
    "up-text-button": "up-button",
}
_OLD_COUNTRIES = {"cocos-islands": "cocos-keeling-islands", "myanmar": "myanmar-burma", "turkey": "turkiye"}
