"""The probes equal their formulas written out, and find what was planted."""

from __future__ import annotations

import numpy as np

from stable_diffusion.evaluation.probes import fit_objects, fit_styles

D, CLASSES, EACH = 12, 9, 6


SCALE = np.where(np.arange(D) < 3, 60.0, 0.5)


def planted(random: np.random.Generator) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Points of classes that differ clearly in nine directions, and in three only by less than their noise."""
    means = random.standard_normal((CLASSES, D)) * np.where(np.arange(D) < 3, 20.0, 2.0)
    return *points(random, means), means


def points(random: np.random.Generator, means: np.ndarray) -> tuple[np.ndarray, list[str]]:
    labels = np.repeat(np.arange(CLASSES), EACH)
    noise = random.standard_normal((len(labels), D)) * SCALE
    return (means[labels] + noise).astype(np.float32), [f"thing {i}" for i in labels]


def mahalanobis(x: np.ndarray, labels: list[str], shrinkage: float, new: np.ndarray) -> np.ndarray:
    """Squared distances of points to the sorted classes' means, by the inverse of the covariance."""
    names = sorted(set(labels))
    index = np.array([names.index(label) for label in labels])
    means = np.stack([x[index == i].mean(0) for i in range(len(names))]).astype(np.float64)
    within = x - means[index]
    covariance = within.T @ within / (len(x) - len(names))
    sphere = np.trace(covariance) / x.shape[1] * np.eye(x.shape[1])
    inverse = np.linalg.inv((1 - shrinkage) * covariance + shrinkage * sphere)
    difference = new[:, None] - means[None]
    return np.einsum("ncd,de,nce->nc", difference, inverse, difference)


def test_ranks_are_those_of_the_mahalanobis_distance() -> None:
    random = np.random.default_rng(0)
    x, labels, _ = planted(random)
    new = (random.standard_normal((40, D)) * 3).astype(np.float32)
    probe = fit_objects(x, labels, shrinkage=0.2)
    order = mahalanobis(x, labels, 0.2, new).argsort(1).argsort(1)
    for i, name in enumerate(probe.objects):
        np.testing.assert_array_equal(probe.ranks(new, [name] * 40), order[:, i])


def test_finds_planted_classes_where_plain_distances_do_not() -> None:
    random = np.random.default_rng(1)
    x, labels, means = planted(random)
    fresh, asked = points(random, means)
    plain = ((fresh[:, None] - means[None]) ** 2).sum(2).argmin(1)
    assert (fit_objects(x, labels, shrinkage=0.001).ranks(fresh, asked) == 0).mean() > 0.95
    assert (plain == np.repeat(np.arange(CLASSES), EACH)).mean() < 0.5


def test_a_left_out_picture_counts_as_if_the_mean_had_never_seen_it() -> None:
    random = np.random.default_rng(2)
    x, labels, _ = planted(random)
    probe = fit_objects(x, labels)
    new = (random.standard_normal((5, D)) * 3).astype(np.float32)
    rest = probe.with_objects(new[1:], ["unseen"] * 4)
    whole = probe.with_objects(new, ["unseen"] * 5)
    assert whole.objects == (*probe.objects, "unseen")
    drawn = (random.standard_normal((30, D)) * 3).astype(np.float32)
    left_out = np.repeat(new[:1], 30, axis=0)
    np.testing.assert_array_equal(
        whole.ranks(drawn, ["unseen"] * 30, left_out), rest.ranks(drawn, ["unseen"] * 30)
    )


def test_further_objects_leave_the_known_ones_as_they_are() -> None:
    x, labels, _ = planted(np.random.default_rng(3))
    probe = fit_objects(x, labels)
    again = probe.with_objects(x[:4] + 1, ["thing 1"] * 4)
    assert again is probe


def test_style_probe_equals_least_squares_with_the_penalty_as_rows() -> None:
    random = np.random.default_rng(4)
    x, labels, _ = planted(random)
    probe = fit_styles(x, labels, ridge=0.3)
    names = sorted(set(labels))
    y = np.array([[float(label == name) for name in names] for label in labels])
    centred, y_mean = x - x.mean(0, dtype=np.float64), y.mean(0)
    penalty = 0.3 * (centred**2).sum(0).mean()
    rows = np.concatenate([centred, np.sqrt(penalty) * np.eye(D)])
    weights = np.linalg.lstsq(rows, np.concatenate([y - y_mean, np.zeros((D, len(names)))]), rcond=None)[0]
    np.testing.assert_allclose(probe.weights.numpy(), weights, atol=1e-6)
    outputs = centred @ weights + y_mean
    assert probe.predict(x) == [names[i] for i in outputs.argmax(1)]
