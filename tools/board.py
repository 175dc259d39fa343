"""Makes a board: what models make of 48 prompts, one below the other, and last the real drawing or scene.

    python tools/board.py docs/first-pictures.png datasets/icons
    python tools/board.py OUT.png DATA MODEL MODEL

Of each task of the benchmark the first prompts in the order in which ``minisd evaluate`` takes them, by hash and not by
eye, with its captions; the first picture of each, whose seed is its place on the board. Without models, the
one that the package carries.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from stable_diffusion import DiffusionModel, images
from stable_diffusion.data.coco import coco_splits
from stable_diffusion.evaluation.pictures import in_order
from stable_diffusion.evaluation.tasks import task_groups

COLUMNS, SIDE, TEXT, GAP = 8, 128, 44, 8
EACH = {"synonym": 12, "two": 6, "position": 6, "counting": 8, "colour": 8, "single": 8}
"""How many prompts of each task."""
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
    found = {group.name: group for group in task_groups(in_order(coco_splits(data)), SEED)}
    chosen = [
        (found[task], row)
        for task, count in EACH.items()
        if task in found
        for row in found[task].rows[:count]
    ]
    height, width = SIDE * (len(models) + 1) + TEXT + GAP, SIDE + GAP
    board = Image.new("RGB", (COLUMNS * width, -(-len(chosen) // COLUMNS) * height), "white")
    pen, font = ImageDraw.Draw(board), ImageFont.load_default(11)
    for place, (group, row) in enumerate(chosen):
        caption = group.caption(row, SEED)
        column = [model.generate(caption, seed=place)[0] for model in models]
        column.append(group.split.source.image(group.split.entries[row].key))
        top, left = place // COLUMNS * height, place % COLUMNS * width
        for i, picture in enumerate(column):
            board.paste(images.cover(picture, SIDE, SIDE), (left, top + i * SIDE))
        below = top + len(column) * SIDE + 2
        pen.text((left, below), textwrap.fill(caption, 22), "black", font, spacing=1)
    board.save(out)


if __name__ == "__main__":
    main()
