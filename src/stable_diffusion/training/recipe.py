"""Recipes: one TOML file says on what data a model is trained, and with which settings."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stable_diffusion.config import ModelConfig, from_dict, preset
from stable_diffusion.data.coco import CocoImageLoader
from stable_diffusion.data.icons import write_icons
from stable_diffusion.data.item import CaptionedImages
from stable_diffusion.data.shapes import write_shapes
from stable_diffusion.errors import InputError


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where a recipe's pictures come from."""

    kind: Literal["coco", "shapes", "icons"] = "coco"
    images: str = ""
    """coco: the image folder."""
    captions: str = ""
    """coco: the captions file."""
    count: int = 5000
    """shapes: how many pictures to draw."""
    size: int = 128
    """shapes, icons: their side in pixels."""
    seed: int = 0
    """shapes: of the drawing."""


@dataclass(frozen=True)
class Recipe:
    """What a file in ``recipes/`` says: a table ``[data]``, and a table ``[model]`` of changes to a preset."""

    name: str
    data: DataConfig
    config: ModelConfig

    def open_data(self) -> CaptionedImages:
        """The captioned pictures; drawn sets are made in ``datasets/`` first."""
        if self.data.kind == "coco":
            return CocoImageLoader(self.data.images, self.data.captions)
        folder = Path("datasets") / self.name
        if self.data.kind == "shapes":
            steps = write_shapes(folder, self.data.count, self.data.size, self.data.seed)
        else:
            steps = write_icons(folder, self.data.size, None)
        for _ in steps:
            pass
        return CocoImageLoader(folder / "train", folder / "annotations" / "captions_train.json")


def read_recipe(path: Path) -> Recipe:
    """The recipe in a TOML file.

    Raises:
        InputError: no such file, not TOML, or a setting that does not exist.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: give a recipe file, or --images and --captions") from None
    except OSError as error:
        raise InputError(f"cannot open {path}: {error.strerror}; give a recipe file") from None
    except ValueError as error:
        raise InputError(f"{path} is not TOML: {error}") from None
    for table in content:
        if table not in ("data", "model"):
            raise InputError(f"{path} has the table {table!r}: a recipe has [data] and [model]")
    settings = dict(content.get("model", {}))
    base = preset(settings.pop("base", "mini"))
    config = from_dict(ModelConfig, settings, base=base)
    return Recipe(path.stem, from_dict(DataConfig, content.get("data", {})), config)
