"""The random numbers of training: pure functions of seed, stage and step, so that resuming is exact."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any

import torch
from torch import Tensor

from stable_diffusion.diffusion.schedule import FLOAT64
from stable_diffusion.fields import within

SEED = Annotated[int, within(0, 2**63 - 1)]
FLOAT32: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
"""How random numbers are sampled, whatever torch's defaults are set to: a seed gives the same ones everywhere."""


class Samples:
    """The order in which the samples of a set are met, a new one every epoch.

    Args:
        count: samples that there are.
        weights: of each, above 0: an epoch holds its share of the `count`, rounded up or down at random. None
            holds each once.
    """

    def __init__(self, count: int, weights: Sequence[float] | None = None) -> None:
        self.count = count
        self._ends = torch.tensor(weights or (1.0,) * count, **FLOAT64).cumsum(0)
        self.order = lru_cache(maxsize=4)(self._order)
        """Of an epoch, by seed, stage and the epoch's number."""

    def _order(self, seed: int, stage: str, epoch: int) -> list[int]:
        """Systematic sampling (Madow 1949): equal steps through the summed weights from a random start, shuffled."""
        generator = torch.Generator().manual_seed(_seed(seed, stage, "order", epoch))
        start = torch.rand((), generator=generator, **FLOAT64)
        places = torch.arange(self.count, **FLOAT64)
        marks = (places + start) * self._ends[-1] / self.count
        chosen = torch.searchsorted(self._ends, marks, right=True).clamp(max=self.count - 1)
        return chosen[torch.randperm(self.count, generator=generator, device="cpu")].tolist()


@dataclass(frozen=True)
class Draw:
    """The randomness of one batch, or of this process's part of it."""

    seed: int
    stage: str
    step: int
    places: range
    """Positions in the batch that are computed here; all of them for one process and one micro-batch."""
    batch_size: int
    """Of all processes and micro-batches together."""

    def indices(self, samples: Samples) -> list[int]:
        """Sample indices of these positions; every epoch has a new order."""
        found = [divmod(self.step * self.batch_size + place, samples.count) for place in self.places]
        return [samples.order(self.seed, self.stage, epoch)[i] for epoch, i in found]

    def generator(self) -> torch.Generator:
        """Of the whole batch's randomness; every process samples all of it and keeps its ``share``."""
        return torch.Generator().manual_seed(_seed(self.seed, self.stage, self.step))

    def share(self, drawn: Tensor) -> Tensor:
        """The rows of these positions, of one row for each sample of the whole batch."""
        return drawn[self.places.start : self.places.stop : self.places.step]


def _seed(*parts: object) -> int:
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest(), "big")
