"""The OpenAI surface, ``/v1``: pictures from words, edits of pictures, and models, for OpenAI's own client."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from functools import partial
from typing import Any

from PIL import Image
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from stable_diffusion import images
from stable_diffusion.errors import InputError, unknown_name
from stable_diffusion.serve.door import Refused, Served
from stable_diffusion.serve.job import Job
from stable_diffusion.serve.openai_fields import Wanted, opened, read
from stable_diffusion.serve.replies import (
    SILENCE,
    Stream,
    address_of,
    encoded,
    event,
    finished,
    form_parts,
    in_base64,
    json_body,
    problem,
    server_of,
    submit,
)

logger = logging.getLogger(__name__)

MOST_FILES = 4
MOST_PARTS = 64
STRENGTH = 1.0
"""Of an edit with a mask: upstream's masks say what is to be made anew."""
PICTURE = "openai_picture"
NO_USAGE = {
    "input_tokens": 0,
    "output_tokens": 0,
    "total_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
}
KINDS = {429: "rate_limit_error"}
CODES = {401: "invalid_api_key", 404: "not_found", 429: "rate_limit_exceeded"}


def error(status: int, message: str, field: str | None, headers: Mapping[str, str]) -> Response:
    """An error as upstream has it; its request's id stands in the log where the fault is ours."""
    id = _request_id()
    more = {"x-request-id": id}
    if status == 500:
        logger.error("the OpenAI surface answers %s with status %d", id, status)
        more["x-should-retry"] = "false"  # it would be the same again
    body = {"error": _error(status, message, field)}
    return JSONResponse(body, status_code=status, headers={**headers, **more})


def _error(status: int, message: str, field: str | None) -> dict[str, str | None]:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"message": message, "type": KINDS.get(status, kind), "param": field, "code": CODES.get(status)}


def _request_id() -> str:
    return f"req_{secrets.token_hex(12)}"


async def generations(request: Request) -> Response:
    """Pictures from words."""
    return await _answer(request, read(await json_body(request)), "image_generation")


async def edits(request: Request) -> Response:
    """Pictures from a picture and words, or with a mask a part of it anew."""
    texts: dict[str, str] = {}
    files: dict[str, list[bytes | str]] = {"image": [], "mask": []}
    for name, content in await form_parts(request, most_files=MOST_FILES, most_parts=MOST_PARTS):
        bare = re.sub(r"\[\d*\]$", "", name)  # image[]
        if bare in files:
            files[bare].append(content)
        else:
            texts[name] = content if isinstance(content, str) else content.decode("utf-8", "replace")
    wanted = read(texts, form=True)
    for name, found in files.items():
        if len(found) > 1:
            raise Refused(f"one {name} is read here, got {len(found)}: leave the others out", field=name)
    if not files["image"]:
        raise Refused("image is missing: give the picture to change", field="image")
    mask = files["mask"][0] if files["mask"] else None
    pictures = await asyncio.to_thread(opened, files["image"][0], mask)
    return await _answer(request, wanted, "image_edit", pictures)


async def _answer(
    request: Request, wanted: Wanted, kind: str, pictures: Mapping[str, Image.Image] | None = None
) -> Response:
    server = server_of(request)
    served = server.models.all.get(wanted.model or "", server.models.default)
    wanted.check(served.config)
    fields = {**wanted.fields(), **(pictures or {})}
    if "mask_image" in fields:
        fields.setdefault("strength", STRENGTH)
    job = await submit(
        request,
        served,
        fields,
        then=images.to_rgb if wanted.background == "opaque" else None,
        client=address_of(request),
        previews=wanted.partial_images if wanted.stream else 0,
    )
    headers = {"x-request-id": _request_id()}
    if wanted.ignored:
        headers["x-minisd-ignored"] = ", ".join(_plain(name) for name in wanted.ignored[:20])
    if wanted.stream:
        answer = Stream(_events(request, job, wanted, kind), gone=partial(server.jobs.cancel, job))
        answer.headers.update(headers)
        return answer
    await finished(request, job)
    return await asyncio.to_thread(_reply, request, job, wanted, headers)


def _reply(request: Request, job: Job, wanted: Wanted, headers: Mapping[str, str]) -> Response:
    if wanted.response_format == "url":
        said = [_url(request, job, index, wanted) for index in range(len(job.pictures))]
    else:
        said = [_file(picture, wanted) for picture in job.pictures]
    pairs = zip(said, job.request.seeds, strict=True)
    data = [{wanted.response_format: text, "seed": seed} for text, seed in pairs]
    body = {"created": int(time.time()), **_described(job.pictures[0], wanted), "data": data}
    return JSONResponse(body | _notes(job), headers=dict(headers))


async def _events(request: Request, job: Job, wanted: Wanted, kind: str) -> AsyncGenerator[bytes, None]:
    finish, previewed, count = job.finish, 0, 0
    async with aclosing(job.changes(every=SILENCE)) as changes:
        async for _ in changes:
            now = job.progress
            if now.preview is None or now.previewed == previewed:
                yield f": {job.status}, step {now.step} of {now.total}\n\n".encode()  # a comment
                continue
            previewed = now.previewed
            partly = await asyncio.to_thread(finish, now.preview)
            yield await _event(f"{kind}.partial_image", partly, wanted, {"partial_image_index": count})
            count += 1
    try:
        (whole,) = await finished(request, job)
    except InputError as refused:
        found = problem(refused)
        yield event("error", {"error": _error(found.status, found.message, found.field)})
    else:
        more = {"usage": NO_USAGE, "seed": job.request.seed, **_notes(job)}
        yield await _event(f"{kind}.completed", whole, wanted, more)


async def _event(name: str, picture: Image.Image, wanted: Wanted, more: Mapping[str, Any]) -> bytes:
    file = await asyncio.to_thread(_file, picture, wanted)
    said = {"type": name, "b64_json": file, "created_at": int(time.time()), "quality": "auto"}
    return event(name, {**said, **_described(picture, wanted), **more})


def _described(picture: Image.Image, wanted: Wanted) -> dict[str, str]:
    transparent = picture.mode == "RGBA" and wanted.output_format != "jpeg"
    return {
        "size": f"{picture.width}x{picture.height}",
        "output_format": wanted.output_format,
        "background": "transparent" if transparent else "opaque",
    }


def _notes(job: Job) -> dict[str, Any]:
    return {"notes": list(job.notes)} if job.notes else {}


def _file(picture: Image.Image, wanted: Wanted) -> str:
    return in_base64(picture, wanted.output_format, wanted.output_compression)


def _url(request: Request, job: Job, index: int, wanted: Wanted) -> str:
    url = request.url_for(PICTURE, id=job.id, name=f"{index}.{wanted.output_format}")
    if wanted.output_format != "png":
        url = url.include_query_params(quality=wanted.output_compression)
    return str(url)


def _plain(name: str) -> str:
    """A name as a header may have it."""
    return re.sub(r"[^\w.\[\]-]", "?", name[:60], flags=re.ASCII) or "?"


async def picture(request: Request) -> Response:
    """A picture that was asked for as an address, for as long as its job is kept."""
    job = server_of(request).jobs.get(request.path_params["id"])
    pictures = [] if job is None else job.pictures
    name = re.fullmatch(r"([0-9]{1,2})\.(png|jpeg|webp)", request.path_params["name"])
    quality = re.fullmatch("[0-9]{1,2}|100", request.query_params.get("quality", "100"))
    if name is None or quality is None or int(name[1]) >= len(pictures):
        raise Refused("there is no such picture; pictures are kept for 10 minutes", status=404)
    content = await asyncio.to_thread(encoded, pictures[int(name[1])], name[2], int(quality[0]))
    # The pages of other programs, which hand the address on, may show it.
    headers = {"Cross-Origin-Resource-Policy": "cross-origin"}
    return Response(content, media_type=f"image/{name[2]}", headers=headers)


async def models(request: Request) -> Response:
    """The models by whose names one may choose; any other name takes the first of them."""
    data = [_model(served) for served in server_of(request).models.all.values()]
    return JSONResponse({"object": "list", "data": data}, headers={"x-request-id": _request_id()})


async def model(request: Request) -> Response:
    """One of them."""
    name, all = request.path_params["id"], server_of(request).models.all
    if name not in all:
        raise Refused(str(unknown_name("model", name, all)), status=404, field="model")
    return JSONResponse(_model(all[name]), headers={"x-request-id": _request_id()})


def _model(served: Served) -> dict[str, Any]:
    return {"id": served.name, "object": "model", "created": served.created, "owned_by": "minisd"}


ROUTES: list[Route] = [
    Route("/v1/images/generations", generations, methods=["POST"]),
    Route("/v1/images/edits", edits, methods=["POST"]),
    Route("/v1/images/files/{id}/{name}", picture, name=PICTURE),
    Route("/v1/models", models),
    Route("/v1/models/{id:path}", model),
]
