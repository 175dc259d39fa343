"""The OpenAI surface, ``/v1``: pictures from words, edits of pictures, and models, for OpenAI's own client."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import re
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from PIL import Image
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from stable_diffusion import images
from stable_diffusion.errors import unknown_name
from stable_diffusion.serve.door import Refused, Served, asked
from stable_diffusion.serve.jobs import Job
from stable_diffusion.serve.openai_fields import Wanted, opened, read
from stable_diffusion.serve.replies import encoded, finished, json_body, problem, server_of

logger = logging.getLogger(__name__)

MOST_FILES = 4
MOST_PARTS = 64
KEEP_ALIVE = 15.0
"""Seconds after which a stream says something: proxies close silent ones after a minute."""
STRENGTH = 1.0
"""Of an edit with a mask: upstream's masks say what is to be made anew."""
PICTURE = "openai_picture"
NO_USAGE = {
    "input_tokens": 0,
    "output_tokens": 0,
    "total_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
}
CODES = {401: "invalid_api_key", 404: "not_found", 429: "rate_limit_exceeded"}


def error(status: int, message: str, field: str | None, headers: Mapping[str, str]) -> Response:
    """An error as upstream has it; its request's id stands in the log where the fault is ours."""
    id = _request_id()
    if status >= 500:
        logger.error("the OpenAI surface answers %s with status %d", id, status)
    body = {"error": _error(status, message, field)}
    return JSONResponse(body, status_code=status, headers={**headers, "x-request-id": id})


def _error(status: int, message: str, field: str | None) -> dict[str, str | None]:
    kind = (
        "rate_limit_error" if status == 429 else "server_error" if status >= 500 else "invalid_request_error"
    )
    return {"message": message, "type": kind, "param": field, "code": CODES.get(status)}


def _request_id() -> str:
    return f"req_{secrets.token_hex(12)}"


async def generations(request: Request) -> Response:
    """Pictures from words."""
    return await _answer(request, read(await json_body(request)), "image_generation")


async def edits(request: Request) -> Response:
    """Pictures from a picture and words, or with a mask a part of it anew."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "multipart/form-data":
        raise Refused("the body must be a form: send Content-Type: multipart/form-data", status=415)
    texts: dict[str, str] = {}
    files: dict[str, list[bytes | str]] = {"image": [], "mask": []}
    async with request.form(max_files=MOST_FILES, max_fields=MOST_PARTS) as form:
        for name, part in form.multi_items():
            bare = re.sub(r"\[\d*\]$", "", name)  # image[]
            if bare in files:
                files[bare].append(part if isinstance(part, str) else await part.read())
            else:
                texts[name] = (
                    part if isinstance(part, str) else (await part.read()).decode("utf-8", "replace")
                )
    wanted = read(texts, form=True)
    for name, found in files.items():
        if len(found) > 1:
            raise Refused(
                f"one {name} is all that is read here, got {len(found)}: leave the others out", field=name
            )
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
    job = await asyncio.to_thread(_job, request, served, wanted, pictures or {})
    server.jobs.add(job)
    headers = {"x-request-id": _request_id()}
    if wanted.ignored:
        headers["x-minisd-ignored"] = ", ".join(_plain(name) for name in wanted.ignored[:20])
    if wanted.stream:
        headers |= {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        events = _events(request, job, wanted, kind)
        return StreamingResponse(events, media_type="text/event-stream", headers=headers)
    await finished(request, job)
    return await asyncio.to_thread(_reply, request, job, wanted, headers)


def _job(request: Request, served: Served, wanted: Wanted, pictures: Mapping[str, Image.Image]) -> Job:
    fields = {**wanted.fields(), **pictures}
    if "mask_image" in pictures:
        fields.setdefault("strength", STRENGTH)
    found = asked(served, fields)

    def finish(picture: Image.Image) -> Image.Image:
        picture = found.finish(picture)
        return images.to_rgb(picture) if wanted.background == "opaque" else picture

    return Job(
        model=served.model,
        request=found.request,
        finish=finish,
        client=request.client.host if request.client else "",
        previews=wanted.partial_images if wanted.stream else 0,
    )


def _reply(request: Request, job: Job, wanted: Wanted, headers: Mapping[str, str]) -> Response:
    data: list[dict[str, Any]] = []
    for index, picture in enumerate(job.pictures):
        said = (
            _url(request, job, index, wanted) if wanted.response_format == "url" else _file(picture, wanted)
        )
        data.append({wanted.response_format: said, "seed": job.request.seeds[index]})
    body = {"created": int(time.time()), **_described(job.pictures[0], wanted), "data": data}
    return JSONResponse(body | _notes(job), headers=dict(headers))


async def _events(request: Request, job: Job, wanted: Wanted, kind: str) -> AsyncIterator[str]:
    """The stream of a job, which ends when nobody reads it."""

    async def event(name: str, picture: Image.Image, more: Mapping[str, Any]) -> str:
        file = await asyncio.to_thread(_file, picture, wanted)
        said = {"type": f"{kind}.{name}", "b64_json": file, "created_at": int(time.time()), "quality": "auto"}
        return (
            f"event: {kind}.{name}\ndata: {json.dumps(said | _described(picture, wanted) | dict(more))}\n\n"
        )

    shown, count = None, 0
    try:
        async for _ in job.changes(every=KEEP_ALIVE):
            preview = job.preview
            if preview is None or preview is shown:
                yield f": {job.status}, step {job.step} of {job.total}\n\n"  # a comment
                continue
            shown = preview
            picture = await asyncio.to_thread(job.finish, preview)
            yield await event("partial_image", picture, {"partial_image_index": count})
            count += 1
        (picture,) = await finished(request, job)
        more = {"usage": NO_USAGE, "seed": job.request.seed}
        yield await event("completed", picture, more | _notes(job))
    except Exception as fault:  # whatever the drawing raised; the status was sent long ago
        found = problem(fault)
        yield f"data: {json.dumps({'error': _error(found.status, found.message, found.field)})}\n\n"
    finally:
        server_of(request).jobs.cancel(job)


def _described(picture: Image.Image, wanted: Wanted) -> dict[str, Any]:
    return {
        "size": f"{picture.width}x{picture.height}",
        "output_format": wanted.output_format,
        "background": "transparent"
        if picture.mode == "RGBA" and wanted.output_format != "jpeg"
        else "opaque",
    }


def _notes(job: Job) -> dict[str, Any]:
    return {"notes": job.notes} if job.notes else {}


def _file(picture: Image.Image, wanted: Wanted) -> str:
    return base64.b64encode(encoded(picture, wanted.output_format, wanted.output_compression)).decode()


def _url(request: Request, job: Job, index: int, wanted: Wanted) -> str:
    url = request.url_for(PICTURE, id=job.id, index=index, format=wanted.output_format)
    if wanted.output_format != "png":
        url = url.include_query_params(quality=wanted.output_compression)
    return str(url)


def _plain(name: str) -> str:
    """A name as a header may have it."""
    return re.sub(r"[^\w.\[\]-]", "?", name[:60], flags=re.ASCII)


async def picture(request: Request) -> Response:
    """A picture that was asked for as an address, for as long as its job is kept."""
    at = request.path_params
    job, index, format = server_of(request).jobs.get(at["id"]), at["index"], at["format"]
    quality = request.query_params.get("quality", "100")
    known = format in ("png", "jpeg", "webp") and re.fullmatch("[0-9]{1,2}|100", quality)
    if job is None or index >= len(job.pictures) or not known:
        raise Refused("there is no such picture; pictures are kept for ten minutes", status=404)
    content = await asyncio.to_thread(encoded, job.pictures[index], format, int(quality))
    return Response(content, media_type=f"image/{format}")


async def models(request: Request) -> Response:
    """The models by whose names one may choose; any other name draws with the first of them."""
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
    Route("/v1/images/files/{id}/{index:int}.{format}", picture, name=PICTURE),
    Route("/v1/models", models),
    Route("/v1/models/{id:path}", model),
]
