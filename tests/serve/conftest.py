"""Real servers, on free ports of this machine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from stable_diffusion import DiffusionModel
from tests.serve import webui_files
from tests.serve.served import PATIENCE, Running, serving
from tests.tiny import FINE, tiny_model


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


@pytest.fixture(scope="session")
def several(packaged: Running, tiny: Running) -> Iterator[Running]:
    """The package's model, a tiny one, and a tiny one whose pictures have opacity."""
    models = {"icons-128": packaged.server.models.default.model, "tiny": tiny.server.models.default.model}
    with serving({**models, "owner/fine": tiny_model(FINE)}) as running:
        yield running


@pytest.fixture(scope="session")
def openai_client(several: Running) -> Iterator[Any]:
    """OpenAI's own client, which says at once when something is refused."""
    openai = pytest.importorskip("openai")
    with openai.OpenAI(
        base_url=f"{several.url}/v1", api_key="any", max_retries=0, timeout=PATIENCE
    ) as client:
        yield client


@pytest.fixture(scope="session")
def two_models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Two tiny models, the second with a LoRA."""
    with serving(webui_files.models(tmp_path_factory.mktemp("loras"))) as running:
        yield running


@pytest.fixture
def webui(two_models: Running) -> Running:
    """The same, to a client that has chosen no model yet."""
    two_models.server.chosen.clear()
    return two_models


@pytest.fixture
def api(webui: Running) -> Any:
    """`webuiapi`, the client of AUTOMATIC1111's webui."""
    return webui_files.client(webui)


@pytest.fixture
def post(webui: Running) -> webui_files.Post:
    """Posts a body to a path below /sdapi/v1."""
    return webui_files.poster(webui)
