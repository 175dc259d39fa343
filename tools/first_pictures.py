"""Draws docs/first-pictures.png: what the model makes of 32 prompts, each beside the real drawing of that name.

    python tools/first_pictures.py datasets/icons-128 [MODEL]

The first 16 pictures of test_style without sister drawings in training and the first 16 of the training split, in the
order in which ``minisd evaluate`` takes them, with its captions and seeds: by hash, not by eye.
"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from stable_diffusion import DiffusionModel, images
from stable_diffusion.evaluation.pictures import groups, open_splits

OUT = Path(__file__).parents[1] / "docs" / "first-pictures.png"
EACH, COLUMNS, SIDE, TEXT, GAP = 16, 8, 128, 44, 8
SEED = 0


def main(data: Path, source: Path | None) -> None:
    model = DiffusionModel.from_pretrained(source)
    found = {group.name: group for split in open_splits(data) for group in groups(split, SEED)}
    chosen = [found[name] for name in ("test_style, no sister", "train")]
    height, width = SIDE * 2 + TEXT + GAP, SIDE + GAP
    board = Image.new("RGB", (COLUMNS * width, 2 * EACH // COLUMNS * height), "white")
    pen, font = ImageDraw.Draw(board), ImageFont.load_default(11)
    for part, group in enumerate(chosen):
        rows = group.rows[:EACH]
        captions = [group.caption(row, SEED) for row in rows]
        for place, (row, caption) in enumerate(zip(rows, captions, strict=True)):
            (drawn,) = model.generate(caption, seed=SEED + place)
            real = images.cover(group.split.data[group.split.numbers[row]].image, SIDE, SIDE)
            y, x = divmod(part * EACH + place, COLUMNS)
            left, top = x * width, y * height
            board.paste(images.cover(drawn, SIDE, SIDE), (left, top))
            board.paste(real, (left, top + SIDE))
            pen.text((left, top + 2 * SIDE + 2), textwrap.fill(caption, 22), "black", font, spacing=1)
    board.save(OUT)
    print(OUT)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None)
