"""Evaluation runs over any set and over any model: here one that is no network, and pictures that lie in no file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from stable_diffusion.config import AutoencoderTinyConfig, ModelConfig
from stable_diffusion.data.item import Entry, Split
from stable_diffusion.evaluation import features
from stable_diffusion.evaluation.report import Report
from stable_diffusion.evaluation.run import evaluate
from tests.test_import import MODULES, imports, part
from tests.tiny import TINY


class Halves(nn.Module):
    """An autoencoder that averages squares of two pixels a side."""

    config = AutoencoderTinyConfig(
        latent_channels=3, patch_size=2, block_out_channels=(4,), encoder_blocks=(1,), decoder_blocks=(1,)
    )
    device, dtype = torch.device("cpu"), torch.float64

    def encode(self, images: Tensor) -> Tensor:
        assert images.dtype == self.dtype
        return F.avg_pool2d(images, 2)

    def decode(self, latents: Tensor) -> Tensor:
        return F.interpolate(latents, scale_factor=2)

    def state_dict(self) -> Mapping[str, Any]:
        return {}


class Numbers(nn.Module):
    """A part that is only weights."""

    def state_dict(self) -> Mapping[str, Any]:
        return {"weight": torch.arange(4.0)}


@dataclass(frozen=True)
class Model:
    """The parts that evaluation asks for, and no more."""

    config: ModelConfig
    vae: Halves
    unet: Numbers
    text_encoder: Numbers


class Colours:
    """A set of plain colours in two shades."""

    def entries(self) -> list[Entry]:
        return [
            Entry(key=f"{name} {shade}", captions=(f"a {name} picture",), fields={"object": name})
            for name in ("red", "green", "blue")
            for shade in (150, 200)
        ]

    def image(self, key: str) -> Image.Image:
        name, shade = key.split()
        return Image.new("RGB", (8, 8), tuple(int(shade) * (name == x) for x in ("red", "green", "blue")))  # type: ignore[arg-type]


def test_a_model_of_other_networks_on_a_set_without_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "SIZE", 64)
    source = Colours()
    train, val = (Split(name=name, source=source, entries=source.entries()) for name in ("train", "val"))
    asked: list[str] = []

    def generate(captions: Sequence[str], seed: int) -> list[Image.Image]:
        asked.extend(captions)
        return [Image.new("RGB", (8, 8), caption.split()[1]) for caption in captions]

    model = Model(config=TINY, vae=Halves(), unet=Numbers(), text_encoder=Numbers())
    steps = evaluate(
        model, generate, "colours", [val, train], out=tmp_path / "out", cache=tmp_path / "cache", count=4
    )
    report = _returned(steps)
    assert [group.name for group in report.groups] == ["val", "train"]
    assert len(asked) == 8 and all(caption.startswith("a ") for caption in asked)
    assert report.objects == 3 and report.data == "colours"
    assert report.left_out == ("styles: not every training picture has the field 'style'",)
    for group in report.groups:
        assert group.scores["real"].object_top5 == 1
    assert report.codec is not None and report.codec.psnr > 50, "averages of plain colours lose nothing"
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["colours"]


def _returned(steps: Iterator[Any]) -> Report:
    while True:
        try:
            next(steps)
        except StopIteration as end:
            report, _ = end.value
            return report  # type: ignore[no-any-return]


def test_evaluation_knows_neither_generation_nor_where_a_set_comes_from() -> None:
    files = [path for path in MODULES if part(path) == "evaluation"]
    assert not set().union(*map(imports, files)) & {"generation", "checkpoints", "model"}
    text = "".join(path.read_text(encoding="utf-8") for path in files)
    assert not any(word in text for word in ("icon_", "data.coco", "sister", "test_style"))
