"""Makes a board: what models make of 32 prompts, one below the other, and last the real drawing of that name.

    python tools/board.py docs/first-pictures.png datasets/icons-128
    python tools/board.py OUT.png DATA MODEL MODEL

The first 16 pictures of test_style without sister drawings in training and the first 16 of the training split, in the
order in which ``minisd evaluate`` takes them, with its captions and seeds: by hash, not by eye. Without models, the one
that the package carries.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from stable_diffusion import DiffusionModel, images
from stable_diffusion.data.coco import coco_splits
from stable_diffusion.evaluation.pictures import groups, in_order

EACH, COLUMNS, SIDE, TEXT, GAP = 16, 8, 128, 44, 8
SEED = 0


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="picture to write")
    parser.add_argument("data", type=Path, help="folder of the icons' set")
    parser.add_argument("models", nargs="*", type=Path, help="model folders, from top to bottom")
    options = parser.parse_args(arguments)
    draw(options.out, options.data, options.models or [None])
    print(options.out)


def draw(out: Path, data: Path, sources: Sequence[Path | None]) -> None:
    models = [DiffusionModel.from_pretrained(source) for source in sources]
    found = {group.name: group for split in in_order(coco_splits(data)) for group in groups(split, SEED)}
    chosen = [found[name] for name in ("test_style, no sister", "train")]
    height, width = SIDE * (len(models) + 1) + TEXT + GAP, SIDE + GAP
    board = Image.new("RGB", (COLUMNS * width, 2 * EACH // COLUMNS * height), "white")
    pen, font = ImageDraw.Draw(board), ImageFont.load_default(11)
    for part, group in enumerate(chosen):
        rows = group.rows[:EACH]
        captions = [group.caption(row, SEED) for row in rows]
        for place, (row, caption) in enumerate(zip(rows, captions, strict=True)):
            column = [model.generate(caption, seed=SEED + place)[0] for model in models]
            column.append(group.split.source.image(group.split.entries[row].key))
            y, x = divmod(part * EACH + place, COLUMNS)
            left, top = x * width, y * height
            for i, picture in enumerate(column):
                board.paste(images.cover(picture, SIDE, SIDE), (left, top + i * SIDE))
            below = top + len(column) * SIDE + 2
            pen.text((left, below), textwrap.fill(caption, 22), "black", font, spacing=1)
    board.save(out)


if __name__ == "__main__":
    main()
