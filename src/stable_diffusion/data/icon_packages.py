"""Where the drawings of the set of icons come from: npm packages, fetched, read, given names, and drawn.

Each package names its drawings in its own way, by code points or by the words of its time; emojibase's names
stand for all of them here.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import tarfile
import tempfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from stable_diffusion.data.icon_captions import TONES, Thing, plain_code, read_things, slugs
from stable_diffusion.data.item import Progress
from stable_diffusion.errors import InputError
from stable_diffusion.images import opened


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


_FLUENT = (
    "MIT",
    "https://github.com/microsoft/fluentui-emoji/blob/main/LICENSE",
    "Fluent Emoji, by Microsoft Corporation",
)
_NOTO = ("Apache-2.0", "https://github.com/googlefonts/noto-emoji/blob/main/LICENSE")
_CC_BY = ("CC-BY-4.0", "https://creativecommons.org/licenses/by/4.0/")
_EMOJIONE = (*_CC_BY, "EmojiOne 2, by EmojiOne (EmojiTwo)")

PACKAGES: dict[str, Package] = {
    "fluent3d": Package("@lobehub/fluent-emoji-3d", "1.1.0", *_FLUENT),
    "flat": Package("@iconify-json/fluent-emoji-flat", "1.2.6", *_FLUENT),
    "contrast": Package("@iconify-json/fluent-emoji-high-contrast", "1.2.6", *_FLUENT),
    "noto": Package("@iconify-json/noto", "1.2.9", *_NOTO, "Noto Emoji, by Google Inc"),
    "blob": Package("@iconify-json/noto-v1", "1.2.5", *_NOTO, "Noto Emoji (version 1), by Google Inc"),
    "twemoji": Package(
        "@iconify-json/twemoji", "1.2.5", *_CC_BY, "Twemoji, by Twitter, Inc and other contributors"
    ),
    "emojione": Package("@iconify-json/emojione", "1.2.3", *_EMOJIONE),
    "mono": Package("@iconify-json/emojione-monotone", "1.2.1", *_EMOJIONE),
}
"""Where each style's drawings come from."""

NAMES = Package(
    name="emojibase-data",
    version="17.0.0",
    licence="MIT",
    url="https://github.com/milesj/emojibase/blob/master/LICENSE",
    credit="names and keywords: Emojibase, by Miles Johnson",
)

MOST_UNPACKED = 10**9
"""Bytes of a package's files; the largest has a tenth of that."""

NPM_PREFIX = re.compile(r"^npm (error|ERR!)")
"""What npm puts before each line of an error, older versions the second."""

NPM_DETAILS = ("code", "syscall", "path", "errno")
"""Fields that npm writes before the sentence that says what is wrong."""


class Drawing(NamedTuple):
    """One drawing of a package, not drawn yet."""

    style: str
    thing: Thing
    source: str | bytes
    """SVG, or a file's bytes."""


def fetch(folder: Path) -> Iterator[Progress]:
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
            command = [npm, "pack", f"{package.name}@{package.version}", "--pack-destination", "."]
            command += ["--ignore-scripts", "--loglevel=error"]
            run = subprocess.run(
                command, cwd=arriving, capture_output=True, encoding="utf-8", errors="replace", check=False
            )
            file = Path(arriving, package.file)
            if run.returncode or not file.is_file():
                lines = [NPM_PREFIX.sub("", line).strip() for line in run.stderr.splitlines()]
                reasons = (line for line in lines if line and line.split()[0] not in NPM_DETAILS)
                why = next(reasons, f"exit code {run.returncode}")
                raise InputError(
                    f"npm cannot fetch {package.name}@{package.version} ({why}): check the connection, and "
                    "`npm config get registry`"
                )
            file.replace(folder / package.file)
    yield Progress("fetching", len(missing), len(missing))


def read(archive: Path, wanted: Sequence[str]) -> dict[str, bytes]:
    """The files of an npm archive whose names begin with one of ``wanted``, by their names in the package."""
    try:
        with tarfile.open(archive, "r:gz") as tar:
            files, room = {}, MOST_UNPACKED
            for member in tar:
                room -= member.size
                if room < 0:
                    raise tarfile.TarError(f"more than {MOST_UNPACKED:,} bytes unpacked")
                name = member.name.partition("/")[2]
                if member.isfile() and name.startswith(tuple(wanted)):
                    stream = tar.extractfile(member)
                    assert stream is not None  # it is a file
                    files[name] = stream.read()
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise InputError(f"{archive} is damaged ({error}): delete it, and it is fetched again") from error
    if not files:
        raise InputError(f"{archive} holds other files than expected: delete it, and it is fetched again")
    return files


def all_drawings(archives: Path) -> tuple[list[Drawing], Counter[str]]:
    """All drawings that have a name, in order, and how many are left out, by reason.

    Raises:
        InputError: an archive is damaged, or holds something else.
    """
    try:
        names = read(archives / NAMES.file, ["en/data.json", "meta/groups.json"])
        data = json.loads(names["en/data.json"])
        things = read_things(data, json.loads(names["meta/groups.json"]))
        return drawings(archives, things, slugs(data))
    except InputError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise InputError(
            f"the packages in {archives} hold something else than expected ({error!r}): delete them, and they are"
            " fetched again"
        ) from error


def drawings(
    archives: Path, things: Mapping[str, Thing], labels: Mapping[str, str]
) -> tuple[list[Drawing], Counter[str]]:
    """All drawings that have a name, in order, and how many are left out, by reason."""
    left_out: Counter[str] = Counter()
    sets: dict[str, tuple[dict[str, Any], dict[str, str]]] = {}
    found: dict[tuple[str, str], Drawing] = {}
    codes = dict(labels)
    for style, package in PACKAGES.items():
        archive = archives / package.file
        files = read(archive, ["assets/", "icons.json", "chars.json"])
        for name in sorted(files):
            if name.startswith("assets/"):
                code = plain_code(Path(name).stem)
                if code in things:
                    found[style, code] = Drawing(style, things[code], files[name])
                else:
                    left_out[_why(code)] += 1
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
            code = chars.get(name, "") or find_code([name, *sorted(aliases[name])], codes, things)
            if code in things:
                found.setdefault((style, code), Drawing(style, things[code], svg))
            else:
                left_out[_why(code or codes.get(name, ""))] += 1
    return [found[key] for key in sorted(found)], left_out


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


def _why(code: str) -> str:
    """Why a drawing that has this code, or none, is left out."""
    points = set(code.split("-"))
    if points <= _COMPONENTS and code:
        return "a skin tone or hair alone"
    return "people of two skin tones" if len(points & _TONE_POINTS) > 1 else "without a name in emojibase"


def _svgs(icons: dict[str, Any]) -> dict[str, str]:
    """The drawings of an ``icons.json``, mirrored aliases included; those of its past are hidden."""
    shown = {name: icon for name, icon in icons["icons"].items() if not icon.get("hidden")}
    svgs = {name: _svg({**icons, **icon}, icon["body"]) for name, icon in shown.items()}
    for name, alias in icons.get("aliases", {}).items():
        parent = icons["icons"].get(alias["parent"])
        if parent is not None and alias.get("hFlip") and not alias.get("hidden"):
            icon = {**icons, **parent, **alias}
            width = icon.get("left", 0) * 2 + icon.get("width", 16)
            svgs[name] = _svg(icon, f'<g transform="matrix(-1 0 0 1 {width} 0)">{parent["body"]}</g>')
    return svgs


def _svg(icon: dict[str, Any], body: str) -> str:
    sides = {"left": 0, "top": 0, "width": 16, "height": 16}
    box = " ".join(str(icon.get(key, default)) for key, default in sides.items())
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {spaces} viewBox="{box}" width="{{size}}" height="{{size}}">{body}</svg>'


def draw(source: str | bytes, size: int) -> Image.Image:
    """The drawing as RGBA, fitted into a square. Raises InputError where it is damaged."""
    if isinstance(source, bytes):
        with opened("a drawing in a package", io.BytesIO(source)) as image:
            return image.convert("RGBA").resize((size, size), Image.Resampling.LANCZOS)
    import resvg_py

    svg = source.replace("{size}", str(size), 2)
    try:
        png = resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True)
    except ValueError as error:
        raise InputError(f"a drawing in a package is damaged ({error}): delete the packages") from error
    with Image.open(io.BytesIO(png)) as image:
        return image.convert("RGBA")


_TONE_POINTS = {f"{0x1F3FB + number:x}" for number in range(len(TONES))}
_COMPONENTS = {*_TONE_POINTS, "1f9b0", "1f9b1", "1f9b2", "1f9b3"}
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
