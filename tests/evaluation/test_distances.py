"""Laws: the kernel distance is unbiased and says how sure it is; a copy of a training picture stands out."""

from __future__ import annotations

import numpy as np
import pytest

from stable_diffusion.evaluation.distances import MEMORISED, kernel_distance, nearest

RANDOM = np.random.default_rng(0)


def sample(n: int, d: int = 16, shift: float = 0.0) -> np.ndarray:
    return (RANDOM.standard_normal((n, d)) + shift).astype(np.float32)


def test_equals_the_u_statistic_written_out() -> None:
    x, y = sample(7).astype(np.float64), sample(7, shift=0.5).astype(np.float64)

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return float((a @ b / 16 + 1) ** 3)

    terms = [
        k(x[i], x[j]) + k(y[i], y[j]) - k(x[i], y[j]) - k(x[j], y[i])
        for i in range(7)
        for j in range(7)
        if i != j
    ]
    assert kernel_distance(x, y).value == pytest.approx(np.mean(terms), rel=1e-12)


def test_equal_distributions_have_distance_zero_on_average_at_any_size() -> None:
    for size in (4, 40):
        values = np.array([kernel_distance(sample(size), sample(size)).value for _ in range(100)])
        assert abs(values.mean()) < 4 * values.std() / np.sqrt(len(values))


def test_pairs_made_of_one_another_do_not_bias_it() -> None:
    """A picture and its round trip are no independent samples; comparing them would give a distance below zero."""
    values = []
    for _ in range(100):
        x = sample(20)
        values.append(kernel_distance(x, -x).value)  # the same distribution
    assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(len(values))
    assert kernel_distance(x, x).value == pytest.approx(0, abs=1e-12)


def test_it_grows_with_the_shift_and_the_interval_holds_it() -> None:
    x = sample(300)
    near, far = (kernel_distance(x, sample(300, shift=shift)) for shift in (0.2, 0.6))
    assert near.low < near.value < near.high < far.low < far.value < far.high
    assert near.pairs == 300


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    truth = kernel_distance(sample(1000, 4), sample(1000, 4, shift=0.5)).value
    found = [kernel_distance(sample(60, 4), sample(60, 4, shift=0.5)) for _ in range(40)]
    assert 0.85 <= np.mean([one.low < truth < one.high for one in found]) <= 1


def test_nearest_equals_all_distances_written_out() -> None:
    x, training = sample(70), sample(90)
    found = nearest(x, training)
    distances = np.linalg.norm(x[:, None].astype(np.float64) - training[None], axis=2)
    ordered = np.sort(distances, axis=1)
    np.testing.assert_array_equal(found.index, distances.argmin(1))
    np.testing.assert_allclose(found.ratio, ordered[:, 0] / ordered[:, 1], rtol=1e-9)


def test_a_copy_is_memorised_a_new_picture_is_not_and_two_copies_hide_each_other() -> None:
    training = sample(50)
    copy, new = training[7:8] + 1e-3, sample(1)
    assert nearest(copy, training).ratio[0] < MEMORISED < nearest(new, training).ratio[0]
    twice = np.concatenate([training, training[7:8]])
    assert nearest(copy, twice).ratio[0] == pytest.approx(1)
    assert nearest(training[7:8], twice).ratio[0] == pytest.approx(1)
