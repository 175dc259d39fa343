"""Pictures beside and below each other, with labels, as one picture."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stable_diffusion.errors import printable

if TYPE_CHECKING:
    from PIL import Image

GAP, SMALLEST, LINES = 4, 12, 3
"""Pixels between pictures, those of the smallest letters, and the most lines of a label."""
ACROSS = 8
"""The most pictures beside each other where their order is one."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """A table of pictures."""

    title: str = ""
    columns: Sequence[str]
    """What stands above each column."""
    rows: Sequence[tuple[str, Sequence[Image.Image]]]
    """What stands left of each row, and its pictures."""


def wrapped(labels: Sequence[str], pictures: Sequence[Image.Image]) -> list[Block]:
    """Pictures in one order, each with its label above, in as many blocks as they need."""
    lines = -(-len(pictures) // ACROSS)
    across = -(-len(pictures) // lines)
    parts = [slice(first, first + across) for first in range(0, len(pictures), across)]
    return [Block(columns=labels[part], rows=[("", pictures[part])]) for part in parts]


def sheet(blocks: Sequence[Block]) -> Image.Image:
    """The blocks below each other, black on white; pictures of several sizes stand in the middle of their cells."""
    from PIL import Image, ImageDraw, ImageFont

    from stable_diffusion import images

    pictures = [picture for block in blocks for _, row in block.rows for picture in row]
    width, height = (max(picture.size[axis] for picture in pictures) for axis in (0, 1))
    size = max(SMALLEST, min(width, height) // 16)
    font, letters = ImageFont.load_default(size), max(8, width * 9 // (5 * size))

    def label(text: str, most: int = LINES) -> str:
        return textwrap.fill(printable(text), letters, max_lines=most, placeholder=" …")

    line = size * 5 // 4
    across = max(len(block.columns) for block in blocks)
    names = [label(name) for block in blocks for name, _ in block.rows]
    left = max((round(font.getlength(part)) for name in names for part in name.split("\n")), default=0)
    left += 2 * GAP if left else 0
    heads = [max(label(name).count("\n") + 1 for name in block.columns) * line + GAP for block in blocks]
    titles = [line + GAP if block.title else 0 for block in blocks]
    bodies = [len(block.rows) * (height + GAP) for block in blocks]
    whole = Image.new("RGB", (left + across * (width + GAP), sum(heads + titles + bodies) + GAP), "white")
    pen, top = ImageDraw.Draw(whole), GAP
    for block, title, head in zip(blocks, titles, heads, strict=True):
        if block.title:
            pen.text(
                (left or GAP, top), textwrap.shorten(printable(block.title), across * letters), "black", font
            )
        top += title
        for column, name in enumerate(block.columns):
            middle = left + column * (width + GAP) + width // 2
            pen.multiline_text((middle, top), label(name), "black", font, "ma", GAP, "center")
        top += head
        for name, row in block.rows:
            pen.multiline_text((GAP, top + height // 2), label(name), "black", font, "lm", GAP)
            for column, picture in enumerate(row):
                x = left + column * (width + GAP) + (width - picture.width) // 2
                whole.paste(images.to_rgb(picture), (x, top + (height - picture.height) // 2))
            top += height + GAP
    return whole
