"""What the three HTTP surfaces share: reading a body, waiting for a job, and pictures as bytes."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol

from PIL import Image
from python_multipart.multipart import parse_options_header
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from stable_diffusion import images
from stable_diffusion.errors import InputError
from stable_diffusion.files import json_object, lacks_memory
from stable_diffusion.generation.metadata import png_chunks
from stable_diffusion.generation.pipeline import NonFinite
from stable_diffusion.serve.door import Models, Refused, Served, asked
from stable_diffusion.serve.guard import MAX_BODY
from stable_diffusion.serve.job import Job
from stable_diffusion.serve.jobs import Busy, Jobs

GONE_AFTER = 0.1
"""Seconds between two looks whether a client is still there."""
SILENCE = 15.0
"""Seconds after which a stream says that it is there, so that nothing on the way takes it for dead."""
MOST_COMMAS = 20_000
"""Of a JSON body, each of whose values but the first follows one: millions of them hold everybody up for seconds."""


@dataclass(frozen=True, kw_only=True)
class Server:
    """What requests are answered from: ``request.app.state.server``."""

    models: Models
    jobs: Jobs
    prompt_syntax: str = "a1111"
    """How the page and ``/sdapi`` read prompts where a request says nothing; ``/v1`` reads plain text."""
    chosen: dict[str, str] = field(default_factory=dict)
    """The model that a client of ``/sdapi`` chose, by the client's key."""


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
        headers = {"Retry-After": str(error.retry_after)}
        return Problem(status=error.status, message=str(error), headers=headers)
    if isinstance(error, Refused):
        return Problem(status=error.status, message=str(error), field=error.field, headers=error.headers)
    if isinstance(error, NonFinite):  # of the model's weights, not of anything that was asked for
        return Problem(status=500, message=str(error), headers={})
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
    """The body as a JSON object of whole characters. Raises Refused for anything else, 415 for another type."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused("the body must be JSON: send Content-Type: application/json", status=415)
    raw = await request.body()
    if (commas := raw.count(b",")) > MOST_COMMAS:
        raise Refused(f"the body may have at most {MOST_COMMAS:,} commas, got {commas:,}", status=413)
    try:
        body = json_object("the body", raw.decode(), "send an object of settings")
    except UnicodeDecodeError as error:
        raise Refused("the body is not JSON: it must be text in UTF-8") from error
    except InputError as error:
        raise Refused(str(error)) from None
    whole: dict[str, Any] = _whole(body) if b"\\u" in raw else body
    return whole


class _FormInMemory(MultiPartParser):
    spool_max_size = MAX_BODY  # nothing that a client sends reaches a disk, which may be full


async def form_parts(request: Request, *, most_files: int, most_parts: int) -> list[tuple[str, bytes | str]]:
    """The parts of a form under their names, in order; those that are files as bytes.

    Raises:
        Refused: no form that can be read, too many parts, or 415 for another type.
    """
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    if kind != b"multipart/form-data":
        raise Refused("the body must be a form: send Content-Type: multipart/form-data", status=415)
    if options.get(b"charset", b"utf-8").lower() not in (b"utf-8", b"us-ascii"):  # Python has stranger ones
        raise Refused("the form must be in UTF-8: leave charset out of its Content-Type", status=415)
    parser = _FormInMemory(request.headers, request.stream(), max_files=most_files, max_fields=most_parts)
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise Refused(f"the form cannot be read: {error.message}") from None
    try:
        parts = form.multi_items()
        return [(name, part if isinstance(part, str) else await part.read()) for name, part in parts]
    finally:
        await form.close()


def _whole(value: Any) -> Any:
    """JSON with U+FFFD in place of half characters (lone surrogates), which no text in UTF-8 can hold."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [_whole(item) for item in value]
    if isinstance(value, dict):
        return {_whole(key): _whole(item) for key, item in value.items()}
    return value


def address_of(request: Request) -> str:
    """The address that a request came from."""
    return request.client.host if request.client else ""


def job_of(
    served: Served,
    fields: Mapping[str, Any],
    then: Callable[[Image.Image], Image.Image] | None = None,
    **settings: Any,
) -> Job:
    """The job of these fields, for the queue.

    Its pictures are decoded here, for which other clients wait: ``await asyncio.to_thread(job_of, …)``.

    Args:
        served: the model.
        fields: of ``Request``, as ``door.asked`` takes them.
        then: what becomes of each picture at the size that was asked for.
        settings: of ``Job``: `client`, `live`, `previews`.

    Raises:
        InputError: what ``asked`` refuses.
    """
    wanted = asked(served, fields)
    return Job(
        model=served.model,
        request=wanted.request,
        finish=wanted.finish if then is None else lambda picture: then(wanted.finish(picture)),
        public=served.public,
        notes=wanted.notes,
        bytes=wanted.bytes,
        **settings,
    )


async def submit(request: Request, served: Served, fields: Mapping[str, Any], **settings: Any) -> Job:
    """Puts the job that ``job_of`` makes into the queue. Raises InputError where that does, and Busy."""
    return server_of(request).jobs.add(await asyncio.to_thread(job_of, served, fields, **settings))


async def finished(request: Request, job: Job) -> list[Image.Image]:
    """The job's pictures, when they are there; a client that goes away ends it within a step.

    Raises:
        InputError: what generating raised; Refused, 409, where somebody cancelled it, and 5xx for a fault of ours.
        ClientDisconnect: the client went away.
    """
    try:
        async with aclosing(job.changes(every=GONE_AFTER)) as changes:
            async for _ in changes:
                if not job.over and await request.is_disconnected():
                    raise ClientDisconnect
    finally:
        server_of(request).jobs.cancel(job)  # nothing where it is over
    if job.error is not None:
        raise told(job.error)
    if job.status == "cancelled":
        raise Refused("the job was cancelled", status=409)
    return job.pictures


def told(error: Exception) -> InputError:
    """The error of a job as one to raise: what is no client's fault stands in the log already."""
    found = problem(error)
    if isinstance(error, InputError) and found.status < 500:
        return error
    return Refused(found.message, status=found.status, headers=found.headers)


def event(name: str, data: Mapping[str, Any]) -> bytes:
    """A server-sent event with JSON as its data."""
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()


class Stream(StreamingResponse):
    """Server-sent events, such as ``event`` makes.

    Args:
        events: as bytes; it is closed when the client goes away.
        gone: called at the end, also where the client went away before the first event: cancels a job, say.
    """

    def __init__(
        self, events: AsyncGenerator[bytes, None], gone: Callable[[], object] = lambda: None
    ) -> None:
        # Unless it is told so, nginx collects some kB before it hands anything on.
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._events, self._gone = events, gone

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._gone()
            await self._events.aclose()


def encoded(picture: Image.Image, format: str = "png", quality: int = 90) -> bytes:
    """The file of a picture: png, with its settings in it, or jpeg or webp of that quality, 0 to 100.

    A large one takes a second, for which other clients wait: ``await asyncio.to_thread(encoded, …)``.
    """
    content = io.BytesIO()
    settings = picture.info.get("settings")
    if format == "png":
        picture.save(content, format="PNG", pnginfo=None if settings is None else png_chunks(settings))
    else:
        flat = images.to_rgb(picture) if format == "jpeg" else picture
        flat.save(content, format=format.upper(), quality=quality)
    return content.getvalue()


def in_base64(picture: Image.Image, format: str = "png", quality: int = 90) -> str:
    """The same as a text."""
    return base64.b64encode(encoded(picture, format, quality)).decode()


def data_uri(picture: Image.Image, format: str = "png", quality: int = 90) -> str:
    """The same as a text that stands where an address could."""
    return f"data:image/{format};base64,{in_base64(picture, format, quality)}"
