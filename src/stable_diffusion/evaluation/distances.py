"""How far one set of pictures is from another, in features: a kernel distance, and the nearest neighbours."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from stable_diffusion.data.cache import Array

RESAMPLES = 1000
TOGETHER = 64
MEMORISED = 1 / 3
"""A picture whose nearest training picture is nearer than this part of the second nearest counts as memorised
(Yoon et al. 2023, "Diffusion probabilistic models generalize when they fail to memorize"; they measure in pixels)."""


@dataclass(frozen=True)
class KernelDistance:
    """A squared distance, which noise can make negative, with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float
    pairs: int


def kernel_distance(x: Array, y: Array, seed: int = 0) -> KernelDistance:
    """The squared maximum mean discrepancy of two samples of one length, unbiased.

    The kernel is that of KID, (x·y / d + 1)³ (Bińkowski et al. 2018, section 4). The estimator is the U-statistic
    over pairs (Gretton et al. 2012, equation 4), so that a picture and what was made from it may be each other's
    partners: they are never compared. The bootstrap resamples pairs.
    """
    pairs = len(x)
    assert pairs == len(y) >= 2, "two samples of one length, of two pictures or more"
    cross = _kernel(x, y)
    h = _kernel(x, x) + _kernel(y, y) - cross - cross.T
    np.fill_diagonal(h, 0)
    random = np.random.default_rng(seed)
    weights = random.multinomial(pairs, np.full(pairs, 1 / pairs), RESAMPLES).astype(float)
    sums = ((weights @ h) * weights).sum(1)
    # A pair that was taken twice is not compared with itself either.
    comparisons = pairs**2 - (weights**2).sum(1)
    low, high = np.quantile(sums[comparisons > 0] / comparisons[comparisons > 0], [0.025, 0.975])
    return KernelDistance(float(h.sum() / (pairs * (pairs - 1))), float(low), float(high), pairs)


def _kernel(x: Array, y: Array) -> Array:
    return (x.astype(np.float64) @ y.astype(np.float64).T / x.shape[1] + 1) ** 3


@dataclass(frozen=True)
class Nearest:
    """Of each picture, its nearest training picture."""

    index: Array
    """Which one it is."""
    ratio: Array
    """Its distance over that of the second nearest, 0 to 1."""


def nearest(x: Array, training: Array) -> Nearest:
    """The nearest of the training pictures, two at least, by Euclidean distance of features."""
    # In float32 the difference of large squares would lose the small distances, which count here.
    training = training.astype(np.float64)
    norms = (training**2).sum(1)
    index, ratio = [], []
    for start in range(0, len(x), TOGETHER):
        rows = x[start : start + TOGETHER].astype(np.float64)
        squares = np.maximum(norms - 2 * rows @ training.T + (rows**2).sum(1)[:, None], 0)
        pair = np.argpartition(squares, 1, axis=1)[:, :2]  # the nearest, then the second nearest
        first, second = np.take_along_axis(squares, pair, axis=1).T
        index.append(pair[:, 0])
        # Two copies in the training pictures are equally far.
        ratio.append(np.sqrt(np.divide(first, second, out=np.ones_like(first), where=second > 0)))
    return Nearest(np.concatenate(index), np.concatenate(ratio))
