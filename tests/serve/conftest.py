"""Real servers, on free ports of this machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from stable_diffusion import DiffusionModel
from tests.serve.served import Running, serving
from tests.tiny import tiny_model


@pytest.fixture(scope="session")
def tiny() -> Iterator[Running]:
    """A tiny model behind a server without a key."""
    with serving({"tiny": tiny_model()}) as running:
        yield running


@pytest.fixture(scope="session")
def packaged() -> Iterator[Running]:
    """The package's own model."""
    with serving({"icons-128": DiffusionModel.from_pretrained()}) as running:
        yield running
