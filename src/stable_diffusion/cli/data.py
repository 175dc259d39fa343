"""``minisd data``: captioned sets, made and checked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import tyro

from stable_diffusion.cli.show import finished
from stable_diffusion.config import MINI
from stable_diffusion.errors import InputError


def data_shapes(*, out: Path, size: int = 128, count: int = 5000, seed: int = 0) -> None:
    """Draw coloured shapes.

    Args:
        out: The folder to make.
        size: Side of the pictures in pixels.
        count: Number of pictures; every tenth is held out.
        seed: Of the drawing; the same seed gives the same files.
    """
    from stable_diffusion.data.shapes import write_shapes

    write_shapes(out, count=count, size=size, seed=seed)
    print(out)


def data_icons(*, out: Path, size: int = 128, packages: Path | None = None) -> None:
    """Make 20,000 named drawings in eight styles, from npm packages.

    Args:
        out: The folder to make.
        size: Side of the pictures in pixels.
        packages: A folder to keep the npm packages in; by default they are not kept.
    """
    from stable_diffusion.data.icons import write_icons

    print(finished(write_icons(out, size, packages=packages)))


def data_check(
    folder: tyro.conf.Positional[Path | None] = None,
    *,
    images: Path | None = None,
    captions: Path | None = None,
    size: int = MINI.sample_size,
) -> None:
    """Say what training will see of a set: every picture is decoded, every caption measured.

    Args:
        folder: The set: annotations/captions_NAME.json, and the pictures in NAME, as COCO and the sets made here
            have them.
        images: An image folder, instead.
        captions: Its captions file in COCO format.
        size: Side of the pictures in training, in pixels.
    """
    from stable_diffusion.checkpoints.checkpoint import packaged
    from stable_diffusion.data.check import Split, check_set, find_splits
    from stable_diffusion.nn.tokenizer import Tokenizer

    if folder is not None:
        if images is not None or captions is not None:
            raise InputError("give the folder of a set, or --images and --captions, not both")
        splits = find_splits(folder)
    else:
        if images is None or captions is None:
            raise InputError("give the folder of a set, or both --images and --captions")
        splits = [Split(images.resolve().name, images, captions)]
    (text,) = MINI.text_encoders
    tokenizer = Tokenizer(packaged(str(text.packaged)), text.architecture, text.context_length)
    found = check_set(
        splits, size=size, cut=lambda texts: tokenizer(texts).cut, context_length=text.context_length
    )
    print(finished(found))


def data(
    what: tyro.conf.OmitArgPrefixes[
        tyro.conf.OmitSubcommandPrefixes[
            Annotated[Any, tyro.conf.subcommand("shapes", constructor=data_shapes)]
            | Annotated[Any, tyro.conf.subcommand("icons", constructor=data_icons)]
            | Annotated[Any, tyro.conf.subcommand("check", constructor=data_check)]
        ]
    ],
) -> None:
    """Make a set of captioned images in COCO format, or check one."""
