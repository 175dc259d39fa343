"""``minisd data``: captioned sets, made and checked."""

from __future__ import annotations

import warnings
from dataclasses import make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Union

import tyro

from stable_diffusion.cli.parse import deferred
from stable_diffusion.cli.show import finished, say
from stable_diffusion.config import MINI
from stable_diffusion.data.sources import SOURCES, MadeConfig
from stable_diffusion.errors import InputError, printable
from stable_diffusion.fields import Settings


def _with_folder(settings: type[Any]) -> type[Any]:
    """A source's settings as options, and the folder to make."""
    out = ("out", Annotated[Path, tyro.conf.arg(help="The folder to make.")])
    # Checked in `data`: tyro has a form of its own for what is refused as it builds.
    own = {"__doc__": settings.__doc__, "__post_init__": lambda self: None}
    return make_dataclass(
        settings.__name__, [out], bases=(settings,), namespace=own, frozen=True, kw_only=True
    )


def check(
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
    from stable_diffusion.data.check import check_set
    from stable_diffusion.data.coco import coco_split, coco_splits
    from stable_diffusion.nn.tokenizer import Tokenizer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of what is left out, which the report says
        if folder is not None:
            if images is not None or captions is not None:
                raise InputError("give the folder of a set, or --images and --captions, not both")
            splits = coco_splits(folder)
        elif images is None or captions is None:
            raise InputError("give the folder of a set, or both --images and --captions")
        else:
            splits = [coco_split(images, captions)]
    (text,) = MINI.text_encoders
    tokenizer = Tokenizer(packaged(str(text.packaged)), text.architecture, text.context_length)
    found = check_set(
        splits, size=size, cut=lambda texts: tokenizer(texts).cut, context_length=text.context_length
    )
    for report in finished(found):
        say(printable(report, kept="\n"))


if TYPE_CHECKING:
    What = Any
else:
    What = Union[
        *(
            Annotated[_with_folder(settings), tyro.conf.subcommand(name)]
            for name, settings in SOURCES.items()
            if issubclass(settings, MadeConfig)
        ),
        Annotated[Any, tyro.conf.subcommand("check", constructor=deferred(check))],
    ]


def data(what: tyro.conf.OmitArgPrefixes[tyro.conf.OmitSubcommandPrefixes[What]]) -> None:
    """Make a set of captioned images in COCO format, or check one."""
    if not isinstance(what, MadeConfig):
        what()  # the check
    else:
        Settings.__post_init__(what)
        out: Path = vars(what)["out"]
        finished(what.make(out))
        say(out)
