from __future__ import annotations

import pytest

from stable_diffusion.data.coco import CocoImageLoader
from tests.tiny import shapes


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> CocoImageLoader:
    """Nine drawn pictures of 32 pixels; tests that change files draw their own."""
    return shapes(tmp_path_factory.mktemp("data") / "shapes")
