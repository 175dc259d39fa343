"""What the three HTTP surfaces share: reading a body, waiting for a job, and pictures as bytes."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from stable_diffusion.errors import InputError
from stable_diffusion.files import lacks_memory
from stable_diffusion.generation.metadata import png_chunks
from stable_diffusion.serve.door import Models, Refused, Served, asked
from stable_diffusion.serve.jobs import Busy, Job, Jobs

GONE_AFTER = 0.1
"""Seconds between two looks whether a client is still there."""


@dataclass(frozen=True, kw_only=True)
class Server:
    """What requests are answered from: ``request.app.state.server``."""

    models: Models
    jobs: Jobs
    prompt_syntax: str = "a1111"
    """How the page and ``/sdapi`` read prompts where a request says nothing; ``/v1`` reads plain text."""


class ErrorForm(Protocol):
    """An error as a surface's clients expect it."""

    def __call__(
        self, status: int, message: str, field: str | None, headers: Mapping[str, str]
    ) -> Response: ...


@dataclass(frozen=True, kw_only=True)
class Problem:
    """An error as HTTP has it."""

    status: int
    message: str
    field: str | None = None
    headers: Mapping[str, str]


def problem(error: BaseException) -> Problem:
    """What a client is told of an error; what is a fault of ours stands in the log alone."""
    if isinstance(error, Busy):
        return Problem(status=429, message=str(error), headers={"Retry-After": str(error.retry_after)})
    if isinstance(error, Refused):
        return Problem(status=error.status, message=str(error), field=error.field, headers={})
    if isinstance(error, InputError):
        return Problem(status=400, message=str(error), headers={})
    if isinstance(error, Exception) and lacks_memory(error):
        message = "there is too little memory for this picture: ask for a smaller one, or for fewer"
        return Problem(status=503, message=message, headers={"Retry-After": "10"})
    return Problem(status=500, message="the server made a mistake; its log says more", headers={})


def server_of(request: Request) -> Server:
    """The state of the application that a request came to."""
    server: Server = request.app.state.server
    return server


async def json_body(request: Request) -> dict[str, Any]:
    """The body as a JSON object. Raises Refused for anything else, 415 where it is not said to be JSON."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused("the body must be JSON: send Content-Type: application/json", status=415)
    try:
        body = json.loads(await request.body())
    except (ValueError, RecursionError) as error:
        raise Refused(f"the body is not JSON ({error}): send an object of settings") from error
    if not isinstance(body, dict):
        raise Refused("the body must be a JSON object of settings")
    return body


async def submit(request: Request, served: Served, fields: Mapping[str, Any], **settings: Any) -> Job:
    """Puts the request of these fields into the queue; pictures are decoded in a thread of their own.

    Args:
        request: the HTTP request.
        served: the model.
        fields: of ``Request``, as ``door.asked`` takes them.
        settings: of ``Job``: `client`, `live`, `previews`.

    Raises:
        InputError: what ``asked`` refuses, or Busy.
    """
    wanted = await asyncio.to_thread(asked, served, fields)
    job = Job(model=served.model, request=wanted.request, finish=wanted.finish, **settings)
    return server_of(request).jobs.add(job)


async def finished(request: Request, job: Job) -> list[Image.Image]:
    """The job's pictures, when they are there; a client that goes away ends it within a step.

    Raises:
        Exception: what the drawing raised; Refused, 409, where somebody cancelled it.
    """
    try:
        async for _ in job.changes(every=GONE_AFTER):
            if not job.over and await request.is_disconnected():
                raise ClientDisconnect
    finally:
        server_of(request).jobs.cancel(job)  # nothing where it is over
    if job.error is not None:
        raise job.error
    if job.status == "cancelled":
        raise Refused("the job was cancelled", status=409)
    return job.pictures


def encoded(picture: Image.Image, format: str = "png", quality: int = 90) -> bytes:
    """The file of a picture: png, with its settings in it, or jpeg or webp of that quality, 0 to 100."""
    content = io.BytesIO()
    settings = picture.info.get("settings")
    if format == "png":
        picture.save(content, format="PNG", pnginfo=None if settings is None else png_chunks(settings))
    else:
        rgb = picture.convert("RGB") if format == "jpeg" else picture
        rgb.save(content, format=format.upper(), quality=quality)
    return content.getvalue()
