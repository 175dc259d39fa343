"""Laws of the linear code and of the signal-to-noise ratio."""

from __future__ import annotations

import numpy as np
import pytest

from stable_diffusion.evaluation.codec import PatchPCA, psnr, round_trips
from tests.tiny import tiny_model


def pictures(n: int, side: int = 16) -> np.ndarray:
    random = np.random.default_rng(0)
    smooth = random.integers(0, 256, (n, 2, 2, 3)).repeat(side // 2, 1).repeat(side // 2, 2)
    return np.clip(smooth + random.integers(-20, 21, (n, side, side, 3)), 0, 255).astype(np.uint8)


def test_psnr_of_a_known_error() -> None:
    one = np.full((1, 4, 4, 3), 100, dtype=np.uint8)
    assert psnr(one, one + np.uint8(10)) == pytest.approx(20 * np.log10(25.5))


def test_all_components_give_the_pictures_back_and_fewer_give_less() -> None:
    real = pictures(30)
    np.testing.assert_array_equal(PatchPCA(real, 4, 48).round_trip(real), real)
    few, more = (psnr(real, PatchPCA(real, 4, components).round_trip(real)) for components in (3, 12))
    assert 20 < few < more


def test_no_code_of_the_same_size_has_a_smaller_error_on_what_it_was_fitted_on() -> None:
    """Eckart and Young: means of quarter patches, a linear code of 12 numbers a patch, lose more."""
    real = pictures(30)
    means = real.reshape(30, 8, 2, 8, 2, 3).mean((2, 4)).round().repeat(2, 1).repeat(2, 2)
    assert psnr(real, PatchPCA(real, 4, 12).round_trip(real)) > psnr(real, means.astype(np.uint8))


def test_round_trips_are_the_model_s() -> None:
    model = tiny_model()
    real = pictures(5, 32)
    copies = np.stack(list(round_trips(model.vae, real)))
    assert copies.shape == real.shape
    assert copies.dtype == np.uint8
    (one,) = round_trips(model.vae, real[2:3])
    np.testing.assert_allclose(one.astype(int), copies[2], atol=1)
