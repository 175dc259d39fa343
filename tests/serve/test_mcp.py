"""Journeys of a program in which a language model works: the official client, in memory and over standard streams."""

from __future__ import annotations

import asyncio
import base64
import io
import os
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mcp import Client, StdioServerParameters
from mcp.client.stdio import stdio_client
from PIL import Image

import stable_diffusion
from stable_diffusion.serve.door import Models, Served
from stable_diffusion.serve.jobs import Jobs
from stable_diffusion.serve.mcp import mcp_server
from tests.tiny import tiny_model


@pytest.fixture
def jobs() -> Iterator[Jobs]:
    jobs = Jobs()
    yield jobs
    jobs.close()


def talk(jobs: Jobs, ask: Callable[[Client], Awaitable[Any]]) -> Any:
    models = Models([Served(name=name, model=tiny_model(), created=0) for name in ("first", "second")])

    async def within() -> Any:
        async with Client(mcp_server(models, jobs)) as client:
            return await ask(client)

    return asyncio.run(within())


def pictures(result: Any) -> list[Image.Image]:
    found = [Image.open(io.BytesIO(base64.b64decode(c.data))) for c in result.content if c.type == "image"]
    assert all(picture.format == "PNG" for picture in found)
    return found


def test_it_draws_and_lists_models(jobs: Jobs) -> None:
    async def ask(client: Client) -> tuple[Any, ...]:
        words = {"prompt": "a red circle", "seed": 7, "steps": 2}
        return (
            {tool.name for tool in (await client.list_tools()).tools},
            await client.call_tool("list_models", {}),
            await client.call_tool("generate_image", {**words, "count": 2, "width": 48, "height": 48}),
            await client.call_tool("generate_image", {**words, "model": "second", "seed": 8}),
        )

    names, listed, drawn, other = talk(jobs, ask)
    assert names == {"generate_image", "list_models"}
    assert [model["model"] for model in listed.structured_content["result"]] == ["first", "second"]
    first, second = pictures(drawn)
    assert first.size == second.size == (48, 48) and first.tobytes() != second.tobytes()
    assert "seed: 7, 8" in [content.text for content in drawn.content if content.type == "text"]
    (again,) = pictures(other)
    assert '"seed": 8' in again.info["minisd"]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"model": "third"}, "unknown model 'third'"),
        ({"image": "https://example.org/a.png"}, "nothing is fetched"),
        ({"count": 5}, "less than or equal to 4"),
        ({"steps": 0}, "greater than or equal to 1"),
    ],
)
def test_what_it_cannot_do_is_a_sentence(jobs: Jobs, wrong: dict[str, Any], said: str) -> None:
    result = talk(
        jobs, lambda client: client.call_tool("generate_image", {"prompt": "a circle", "steps": 1, **wrong})
    )
    assert result.is_error and said in result.content[0].text


def test_the_command_speaks_over_standard_streams() -> None:
    """With the packaged model, and nothing on standard output that is no message."""

    async def within() -> Any:
        source = str(Path(stable_diffusion.__file__).parents[1])
        command = StdioServerParameters(
            command=sys.executable,
            args=["-m", "stable_diffusion", "mcp"],
            env={**os.environ, "PYTHONPATH": source},
        )
        async with Client(stdio_client(command)) as client:
            return await client.call_tool("generate_image", {"prompt": "a fox", "seed": 7, "steps": 1})

    (picture,) = pictures(asyncio.run(within()))
    assert picture.size == (128, 128)
