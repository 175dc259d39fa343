"""Which object and which style a picture shows: closed-form classifiers of features, fitted on real pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from stable_diffusion.data.cache import Array

SHRINKAGE = 0.03
"""Weight of the sphere in the within-class covariance: thousands of objects have eight drawings each or fewer."""
RIDGE = 0.01
"""Penalty of the style probe, in units of the features' mean variance."""


@dataclass(frozen=True)
class ObjectProbe:
    """Linear discriminant analysis with equal priors: the nearest class mean where classes are round.

    In that space the within-class covariance is the identity (Hastie et al., The Elements of Statistical
    Learning, section 4.3), so that distances to class means rank the classes.
    """

    objects: tuple[str, ...]
    """The classes, in the order of ``means``."""
    whiten: Tensor
    """Features times this matrix lie in the space, ``d d`` in float32."""
    means: Tensor
    """Of every class, in the space, ``classes d``."""
    counts: Tensor
    """Pictures that each mean is of."""

    def with_objects(self, features: Array, objects: Sequence[str]) -> ObjectProbe:
        """The probe with further classes: objects that the covariance was not fitted on.

        The means of the classes that it has already stay as they are.
        """
        known = set(self.objects)
        fresh = [i for i, name in enumerate(objects) if name not in known]
        if not fresh:
            return self
        names, index = _classes([objects[i] for i in fresh])
        means, counts = _means(torch.from_numpy(features[fresh]) @ self.whiten, index, len(names))
        return replace(
            self,
            objects=(*self.objects, *names),
            means=torch.cat([self.means, means]),
            counts=torch.cat([self.counts, counts]),
        )

    def ranks(self, features: Array, asked: Sequence[str], left_out: Array | None = None) -> Array:
        """How many objects are nearer to each picture than the asked one; 0 is the best.

        Args:
            features: of the pictures.
            asked: the object that each should show.
            left_out: for each picture, features of the one real picture that is taken out of the asked
                object's mean, which it was a part of: the picture itself, or the one whose caption was asked for.
        """
        points = torch.from_numpy(features) @ self.whiten
        number = {name: i for i, name in enumerate(self.objects)}
        index = torch.tensor([number[name] for name in asked], dtype=torch.int64)
        # Without the points' own norm, which is the same for all classes.
        distances = self.means.square().sum(1) - 2 * points @ self.means.T  # n classes
        means = self.means[index]
        if left_out is not None:
            counts = self.counts[index, None]
            own = torch.from_numpy(left_out) @ self.whiten
            means = torch.where(counts > 1, (counts * means - own) / (counts - 1).clamp(min=1), means)
        distance = means.square().sum(1) - 2 * (points * means).sum(1)
        distances[torch.arange(len(index)), index] = torch.inf  # the asked object is not before itself
        return (distances < distance[:, None]).sum(1).numpy()


def fit_objects(features: Array, objects: Sequence[str], shrinkage: float = SHRINKAGE) -> ObjectProbe:
    """The probe of the objects that the pictures show.

    The within-class covariance S becomes (1 - shrinkage) S + shrinkage (tr S / d) I (Ledoit and Wolf 2004, with
    a constant weight).
    """
    names, index = _classes(objects)
    x = torch.from_numpy(features)
    means, _ = _means(x, index, len(names))
    within = x - means[index]
    covariance = (within.T @ within).double() / max(len(x) - len(names), 1)
    covariance *= 1 - shrinkage
    covariance.diagonal().add_(shrinkage / (1 - shrinkage) * covariance.diagonal().mean())
    lower = torch.linalg.cholesky(covariance)
    identity = torch.eye(len(lower), dtype=lower.dtype)
    whiten = torch.linalg.solve_triangular(lower, identity, upper=False).T.float().contiguous()
    space_means, counts = _means(x @ whiten, index, len(names))
    return ObjectProbe(names, whiten, space_means, counts)


@dataclass(frozen=True)
class StyleProbe:
    """Ridge regression of the styles' indicator variables; the largest output is the answer."""

    styles: tuple[str, ...]
    weights: Tensor
    """``d styles``."""
    bias: Tensor

    def predict(self, features: Array) -> list[str]:
        """The style of each picture."""
        outputs = torch.from_numpy(features) @ self.weights + self.bias
        return [self.styles[i] for i in outputs.argmax(1).tolist()]


def fit_styles(features: Array, styles: Sequence[str], ridge: float = RIDGE) -> StyleProbe:
    """The probe of the styles that the pictures have.

    The weights minimise |X W - Y|² + penalty |W|², with X and Y centred, so that the bias is not penalised;
    the penalty is `ridge` times the mean diagonal of XᵀX.
    """
    names, index = _classes(styles)
    x = torch.from_numpy(features)
    y = torch.nn.functional.one_hot(index, len(names)).float()
    x_mean, y_mean = x.mean(0), y.mean(0)
    x = x - x_mean
    gram = (x.T @ x).double()
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    weights = torch.cholesky_solve((x.T @ (y - y_mean)).double(), torch.linalg.cholesky(gram)).float()
    return StyleProbe(names, weights, y_mean - x_mean @ weights)


def _classes(labels: Sequence[str]) -> tuple[tuple[str, ...], Tensor]:
    """The distinct labels, sorted, and the number of each label among them."""
    names, index = np.unique(np.asarray(labels, dtype=object).astype(str), return_inverse=True)
    return tuple(names.tolist()), torch.from_numpy(index.astype(np.int64))


def _means(points: Tensor, index: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Each class's mean, and how many points it is of."""
    counts = torch.bincount(index, minlength=classes)
    sums = torch.zeros(classes, points.shape[1], dtype=points.dtype).index_add_(0, index, points)
    return sums / counts[:, None], counts
