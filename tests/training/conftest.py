from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from stable_diffusion.data.coco import CocoImageLoader
from stable_diffusion.training import run
from tests.tiny import shapes
from tests.training.record import PLANS


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> CocoImageLoader:
    """Nine drawn pictures of 32 pixels; tests that change files draw their own."""
    return shapes(tmp_path_factory.mktemp("data") / "shapes")


@pytest.fixture(autouse=True)
def plans(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keeps the plans that runs begin with, for `Record.plan`."""
    train_model = run.train_model

    def kept(*arguments: Any, **settings: Any) -> Iterator[object]:
        for event in (events := train_model(*arguments, **settings)):
            if isinstance(event, run.Plan):
                PLANS.append(event)
            try:
                yield event
            except GeneratorExit:
                events.close()
                raise

    monkeypatch.setattr(run, "train_model", kept)
    yield
    PLANS.clear()
