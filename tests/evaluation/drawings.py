"""A set in the form of the icons: a few coloured things in three styles, with splits that hold some out."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image, ImageDraw

from stable_diffusion.data.icon_captions import style_words

OBJECTS = ("red ball", "blue box", "green kite", "black bar")
UNSEEN = "yellow moon"
STYLE_KEYS = ("noto", "mono", "twemoji")


def write_drawings(folder: Path, size: int = 32, copies: int = 2) -> Path:
    """``train`` lacks one object and one pair of object and style; ``val`` is more of what training has."""
    splits: dict[str, list[tuple[str, str, int]]] = {
        "train": [],
        "val": [],
        "test_style": [],
        "test_object": [],
    }
    for style in STYLE_KEYS:
        for i, name in enumerate((*OBJECTS, UNSEEN)):
            held_out = "test_object" if name == UNSEEN else "test_style"
            split = held_out if name == UNSEEN or i == STYLE_KEYS.index(style) else "train"
            splits[split] += [(name, style, copy) for copy in range(copies)]
            if split == "train":
                splits["val"].append((name, style, copies))
    for split, drawings in splits.items():
        (folder / split).mkdir(parents=True)
        images, annotations = [], []
        for number, (name, style, copy) in enumerate(drawings):
            file = f"{style}-{name.replace(' ', '-')}-{copy}.png"
            _draw(name, style, copy, size).save(folder / split / file)
            words = style_words(style)
            fields = {"style": style, "object": name, "style_words": words}
            if split == "test_style":
                fields["part"] = "sister" if style == "mono" else "no sister"
            images.append({"id": number, "file_name": file, **fields})
            for caption in (name, f"a {name}, {words[0]}", f"{words[1]} of a {name}"):
                annotations.append({"id": len(annotations), "image_id": number, "caption": caption})
        (folder / "annotations").mkdir(exist_ok=True)
        captions = json.dumps({"images": images, "annotations": annotations})
        (folder / "annotations" / f"captions_{split}.json").write_text(captions)
    return folder


def _draw(name: str, style: str, copy: int, size: int) -> Image.Image:
    image = Image.new("RGB", (size, size), "white")
    colour = name.split()[0]
    look = {"fill": None if style == "mono" else colour, "outline": "black" if style == "twemoji" else colour}
    box = (4 + copy, 5, size - 6, size - 5 - copy)
    draw = ImageDraw.Draw(image)
    kind = (*OBJECTS, UNSEEN).index(name)
    if kind in (0, 4):
        draw.ellipse(box if kind == 0 else (box[0], 12, box[2], 22), **look, width=2)
    elif kind == 2:
        draw.regular_polygon((size / 2, size / 2, size / 2 - 4 - copy), 4, rotation=45, **look)
    else:
        draw.rectangle(box if kind == 1 else (13, box[1], 18, box[3]), **look, width=2)
    return image
