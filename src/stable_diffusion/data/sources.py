"""Where captioned images come from: a table of sources, each with its settings.

A source is one dataclass and one row in ``SOURCES``, by which recipes and ``minisd data`` know it. Importing the
table is light: a source's own file is imported when it is used.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

from stable_diffusion.errors import unknown_name
from stable_diffusion.fields import Rule, Settings, from_dict, within

if TYPE_CHECKING:
    from stable_diffusion.data.item import Files, Progress, Source

FilePath = Annotated[str, Rule("a path of a file", lambda path: "\0" not in path)]


class SourceConfig(Protocol):
    """Settings of a source: a frozen dataclass."""

    def open(self, folder: Path) -> Source:
        """What training reads."""
        ...


class MadeConfig(Settings, ABC):
    """Settings of a set in COCO's layout that is made here, by ``minisd data`` and before a training."""

    @abstractmethod
    def make(self, folder: Path) -> Generator[Progress, None, None]:
        """Makes the set in the folder, as it is consumed, or leaves one that was made with the same settings."""

    def open(self, folder: Path) -> Files:
        """The training split of the set in the folder."""
        captions = folder / "annotations" / "captions_train.json"
        return Coco(images=str(folder / "train"), captions=str(captions)).open(folder)


@dataclass(frozen=True, kw_only=True)
class Coco(Settings):
    """A folder of pictures, and their captions in COCO's format."""

    images: FilePath = ""
    """The image folder."""
    captions: FilePath = ""
    """Its captions file."""

    def open(self, folder: Path) -> Files:
        """The pictures, wherever the folder is: they lie where the settings say."""
        from stable_diffusion.data.coco import CocoImageLoader

        return CocoImageLoader(self.images, self.captions)


@dataclass(frozen=True, kw_only=True)
class Shapes(MadeConfig):
    """Draw coloured shapes."""

    size: Annotated[int, within(16, 4096)] = 128
    """Side of the pictures in pixels."""
    count: Annotated[int, within(2, 10_000_000)] = 5000
    """Number of pictures; every tenth is held out."""
    seed: Annotated[int, within(0, 2**63 - 1)] = 0
    """Of the random numbers; the same seed gives the same files."""

    def make(self, folder: Path) -> Generator[Progress, None, None]:
        """See ``write_shapes``."""
        from stable_diffusion.data.shapes import write_shapes

        yield from write_shapes(folder, self.count, self.size, self.seed)


@dataclass(frozen=True, kw_only=True)
class Icons(MadeConfig):
    """Make 20,000 named drawings in eight styles from npm packages, and scenes of them."""

    size: Annotated[int, within(16, 1024)] = 128
    """Side of the pictures in pixels."""
    scenes: Annotated[int, within(0, 10_000_000)] = 60_000
    """Scenes of several things, counts, colours and places to learn from, and up to 500 of each kind to test with."""
    alpha: bool = False
    """Keep the drawings' transparency, for a decoder that gives opacity."""
    packages: FilePath | None = None
    """A folder to keep the npm packages in; by default they are not kept."""

    def make(self, folder: Path) -> Generator[Progress, None, None]:
        """See ``write_icons``."""
        from stable_diffusion.data.icons import write_icons

        packages = None if self.packages is None else Path(self.packages)
        yield from write_icons(folder, self.size, packages, self.scenes, self.alpha)

    def open(self, folder: Path) -> Files:
        """The drawings to learn from, and the scenes."""
        from stable_diffusion.data.item import Joined

        drawings, file = super().open(folder), folder / "annotations" / "captions_train_scenes.json"
        if not self.scenes:
            return drawings
        return Joined([drawings, Coco(images=str(folder / "train_scenes"), captions=str(file)).open(folder)])


SOURCES: dict[str, type[SourceConfig]] = {"coco": Coco, "shapes": Shapes, "icons": Icons}


def source_config(table: Mapping[str, Any]) -> SourceConfig:
    """The settings that a recipe's table ``[data]`` gives: a ``source``, by its name, and settings of that source.

    Raises:
        InputError: there is no such source, or it has no such setting.
    """
    settings = {key: value for key, value in table.items() if key != "source"}
    name = table.get("source", "coco")
    if not isinstance(name, str) or name not in SOURCES:
        raise unknown_name("source", name, SOURCES)
    return from_dict(SOURCES[name], settings)


def open_source(config: SourceConfig, folder: Path) -> Generator[Progress, None, Source]:
    """What training reads; a set that is made here is made in the folder first."""
    if isinstance(config, MadeConfig):
        yield from config.make(folder)
    return config.open(folder)
