"""Captioned images in COCO's format: a folder of pictures and one JSON file with their captions."""

from __future__ import annotations

import json
import math
import os
import re
import unicodedata
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from PIL import Image

from stable_diffusion.data.item import Entry, Item, Split, ahead
from stable_diffusion.errors import InputError, three_of
from stable_diffusion.files import exists, read_bytes, reading
from stable_diffusion.images import check_header, open_image, opened

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff", ".ppm"}
_OWN = {"id", "file_name", "width", "height", "license", "coco_url", "flickr_url", "date_captured", "weight"}
_TEST_SPLIT = "COCO publishes no captions for its test pictures: use val2017 or train2017"


@dataclass(frozen=True, kw_only=True)
class CocoReport:
    """What a loader found, and what it left out and why; ``str`` gives lines to read."""

    pictures: int
    """Pictures that can be used."""
    captions: int
    """Captions of these pictures."""
    images_without_captions: tuple[str, ...] = ()
    """Names of pictures, in the folder or in the JSON file, that no usable caption belongs to."""
    captions_without_images: tuple[str, ...] = ()
    """Names of pictures that have captions and no file, and ``image_id …`` for ids that no picture has."""
    unreadable: tuple[str, ...] = ()
    """Names of files that have captions and are not pictures."""
    unusable_captions: tuple[str, ...] = ()
    """Names of the pictures of captions that are empty or not text, once for each such caption."""
    backslashes: int = 0
    """Names in the JSON file whose backslashes were taken as the separators of folders."""

    @property
    def left_out(self) -> dict[str, tuple[str, ...]]:
        """The names that were left out, by reason; empty if there are none."""
        return {
            reason.replace("_", " "): names
            for reason, names in vars(self).items()
            if isinstance(names, tuple) and names
        }

    def __str__(self) -> str:
        lines = [f"{self.pictures} pictures with {self.captions} captions"]
        for reason, names in self.left_out.items():
            lines.append(f"  left out: {len(names)} {reason} ({three_of(names)})")
        if self.backslashes:
            lines.append(f"  backslashes taken as separators of folders: in {self.backslashes} names")
        return "\n".join(lines)


class CocoImageLoader:
    """The pictures of a folder that a COCO captions file describes, ordered by file name.

    What cannot be used is counted and named in ``report``, and in one warning. The header of every picture is
    read when the loader is made.

    Args:
        image_folder: holds the pictures; names in the JSON file are relative to it.
        captions_file: JSON with ``images`` (``id``, ``file_name``; also ``weight``, how often training samples
            the picture, where some are to be seen more often than others) and ``annotations`` (``image_id``,
            ``caption``). What else an image says becomes a field of its entry, and so does the folder's name,
            as ``split``.

    Raises:
        InputError: the folder or the file is missing, the file is not of this form or names a picture outside
            the folder, or no picture with a caption is left.
    """

    report: CocoReport

    def __init__(self, image_folder: str | Path, captions_file: str | Path) -> None:
        self.image_folder = Path(image_folder)
        self.captions_file = Path(captions_file)
        if not self.image_folder.is_dir():
            raise InputError(f"there is no folder of pictures {str(image_folder)!r}: check the path")
        images, annotations = _read(self.captions_file)
        names = _names(images, self.captions_file, self.image_folder)
        weights = _weights(images, names, self.captions_file)
        captions: dict[str, list[str]] = {name: [] for name in names.values()}
        orphans: dict[str, None] = {}  # a set that keeps the order
        unusable = []
        for annotation in annotations:
            name = names.get(annotation["image_id"])
            caption = annotation.get("caption")
            text = " ".join(caption.split()) if isinstance(caption, str) else ""
            if name is None:
                orphans[f"image_id {annotation['image_id']}"] = None
            elif text:
                captions[name].append(text)
            else:
                unusable.append(name)

        with reading(self.image_folder):
            files = _files(self.image_folder, captions)
        here = {name: files.pop(_key(name), None) for name in sorted(captions)}
        usable = {name: file for name, file in here.items() if file is not None and captions[name]}
        sound = dict(zip(usable, ahead(self._is_picture, usable.values()), strict=True))
        self._files = {name: file for name, file in usable.items() if sound[name]}
        self._names = list(self._files)
        split = {"split": self.image_folder.absolute().name}
        said = {names[image["id"]]: {k: v for k, v in image.items() if k not in _OWN} for image in images}
        self._entries = {
            name: Entry(
                key=name,
                captions=tuple(captions[name]),
                weight=weights[name],
                fields=split | said[name] if said[name] else split,
            )
            for name in self._names
        }
        bare = [name for name in here if not captions[name]]
        self.report = CocoReport(
            pictures=len(self._names),
            captions=sum(len(captions[name]) for name in self._names),
            images_without_captions=tuple(sorted([*bare, *files.values()])),
            captions_without_images=(
                *(name for name, file in here.items() if file is None and captions[name]),
                *orphans,
            ),
            unreadable=tuple(name for name in usable if not sound[name]),
            unusable_captions=tuple(sorted(unusable)),
            backslashes=sum(
                "\\" in image["file_name"] and "\\" not in names[image["id"]] for image in images
            ),
        )
        if not self._names:
            found = ", ".join(f"{len(v)} {reason} ({v[0]})" for reason, v in self.report.left_out.items())
            raise InputError(
                f"no picture in {str(image_folder)!r} has a caption in {str(captions_file)!r} "
                f"({found or 'both are empty'}): check that the two belong together"
            )
        if self.report.left_out or self.report.backslashes:
            warnings.warn(f"{self.captions_file.name}: {self.report}", stacklevel=2)

    def __len__(self) -> int:
        return len(self._names)

    def entries(self) -> list[Entry]:
        """Every picture that can be used, in the order of names; its header was read, it is not decoded."""
        return [self._entry(name) for name in self._names]

    def image(self, key: str) -> Image.Image:
        """The picture of that name. Raises InputError if it cannot be decoded."""
        return open_image(self._file(key))

    def opened(self, key: str) -> AbstractContextManager[Image.Image]:
        """Its file, for a look at what ``image`` changes."""
        return opened(self._file(key))

    def _file(self, key: str) -> Path:
        return self.image_folder / self._files[key]

    def _entry(self, key: str) -> Entry:
        stat = self._file(key).stat()
        # The time of change too: programs set the other one, as when they copy or unpack.
        version = f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"
        return replace(self._entries[key], version=version)

    def __getitem__(self, index: int) -> Item:
        """Raises InputError if the picture cannot be decoded."""
        key = self._names[index]
        image = self.image(key)
        return Item(**vars(self._entry(key)), image=image)

    def __iter__(self) -> Iterator[Item]:
        return (self[index] for index in range(len(self)))

    def _is_picture(self, file: str) -> bool:
        try:
            check_header(self.image_folder / file)
        except InputError:
            return False
        return True


def coco_split(image_folder: Path, captions_file: Path) -> Split:
    """The pictures of a folder, as a split of its name."""
    loader = CocoImageLoader(image_folder, captions_file)
    return Split(name=image_folder.absolute().name, source=loader, entries=loader.entries())


def coco_splits(folder: str | Path) -> list[Split]:
    """The splits of a set: ``annotations/captions_NAME.json`` with the pictures in ``NAME/``, as COCO has them.

    Those that training reads come first. Captions whose pictures are not there are passed over: COCO's come
    for all splits in one archive, the pictures in one for each. Raises InputError where there is no split.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"there is no folder {str(folder)!r}: check the path")
    with reading(folder):
        os.scandir(folder / "annotations" if exists(folder / "annotations") else folder).close()
    files = {path.stem.removeprefix("captions_"): path for path in folder.glob("annotations/captions_*.json")}
    found = [coco_split(folder / name, path) for name, path in files.items() if (folder / name).is_dir()]
    if not found:
        raise InputError(
            f"{str(folder)!r} holds no set, which is annotations/captions_NAME.json and its pictures in NAME;"
            " minisd data check takes others with --images and --captions"
        )
    return sorted(found, key=lambda split: (not split.is_training, split.name))


def _read(path: Path) -> tuple[list[Any], list[Any]]:
    """The file's lists of images and of annotations. Raises InputError if it has not the form that COCO's have."""
    test_split = f" ({_TEST_SPLIT})" if "test20" in path.name else ""
    try:
        data = json.loads(read_bytes(path))  # in UTF-8, UTF-16 or UTF-32
    except InputError as error:
        raise InputError(f"{error}{test_split}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"the captions file {str(path)!r} is not JSON in UTF-8 ({error}): fetch it again, or save it in UTF-8"
        ) from error
    images = data.get("images") if isinstance(data, dict) else None
    if not isinstance(images, list):
        raise InputError(f"{str(path)!r} is not a COCO captions file, which lists 'images' and 'annotations'")
    annotations = data.get("annotations")
    if not isinstance(annotations, list):
        raise InputError(f"{str(path)!r} lists pictures and no captions ({_TEST_SPLIT}, or another file)")
    for number, annotation in enumerate(annotations):
        key = _id(annotation.get("image_id")) if isinstance(annotation, dict) else None
        if key is None:
            raise InputError(f"annotation {number} in {str(path)!r} has no 'image_id': export the file again")
        annotation["image_id"] = key
    if annotations and not any("caption" in annotation for annotation in annotations):
        raise InputError(f"the annotations in {str(path)!r} have no captions: use the set's captions_….json")
    return images, annotations


def _id(value: object) -> str | None:
    """An id as text, since one program writes 1 where another has "1", 1.0 or "000001"; None for what is none."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, (int, str)):
        return None
    number = re.fullmatch(r"0{0,20}([0-9]{1,20})(\.0{1,9})?", str(value))
    return number[1] if number else str(value)


def _names(images: list[Any], captions_file: Path, folder: Path) -> dict[str, str]:
    """File names by image id; entries of one file share a name. Raises InputError for names out of the folder.

    Backslashes are separators, as Windows writes them, unless a file has them in its name.
    """
    names: dict[str, str] = {}
    for number, image in enumerate(images):
        entry = image if isinstance(image, dict) else {}
        key, file_name = _id(entry.get("id")), entry.get("file_name")
        where = f"image {number} in {str(captions_file)!r}"
        if key is None or not isinstance(file_name, str) or not file_name:
            raise InputError(f"{where} has no 'id' and 'file_name': fetch or export the file again")
        parts = (*PurePosixPath(file_name).parts, *PureWindowsPath(file_name).parts)
        anchor = PurePosixPath(file_name).anchor or PureWindowsPath(file_name).anchor
        if anchor or ".." in parts:
            raise InputError(f"{where} names a file outside the folder, {file_name!r}: use relative paths")
        own = "\\" in file_name and os.sep == "/" and os.path.lexists(folder / file_name)
        name = str(PurePosixPath(file_name if own else file_name.replace("\\", "/")))
        image["id"] = key
        if names.setdefault(key, name) != name:
            raise InputError(f"{where} has the id {key} of another picture: give each picture its own")
    return names


def _weights(images: list[dict[str, Any]], names: dict[str, str], captions_file: Path) -> dict[str, float]:
    """How often training samples each file, by name. Raises InputError for a weight that is not a positive number."""
    weights = {}
    for image in images:
        weight = image.get("weight", 1.0)
        number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if not number or not 0 < weight < math.inf:
            raise InputError(
                f"the weight of {image['file_name']!r} in {str(captions_file)!r} must be a number above 0,"
                f" got {weight!r}: correct it, or leave it out for 1"
            )
        weights[names[image["id"]]] = float(weight)
    return weights


def _files(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """The pictures in the folder, and all files in the subfolders of ``names``, by key: paths relative to it.

    Reading folders is faster than asking for each of 118,000 files, and finds those whose accents are spelt
    with other code points.
    """
    names = list(names)
    wanted = {_key(name) for name in names}
    found = {}
    for parent in sorted({"."} | {str(PurePosixPath(name).parent) for name in names}):
        if not (folder / parent).is_dir():
            continue
        with os.scandir(folder / parent) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                file = str(PurePosixPath(parent, entry.name))
                if _key(file) in wanted or (Path(entry.name).suffix.lower() in _SUFFIXES and entry.is_file()):
                    found[_key(file)] = file
    return found


def _key(name: str) -> str:
    return os.path.normcase(unicodedata.normalize("NFC", name))
