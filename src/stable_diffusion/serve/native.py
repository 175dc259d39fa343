"""Our own surface, ``/api``: jobs, live typing and models."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from functools import partial
from typing import Annotated, Any

from PIL import Image
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from stable_diffusion.diffusion.names import SAMPLERS, SPACINGS
from stable_diffusion.errors import InputError, shown
from stable_diffusion.fields import typed, within
from stable_diffusion.generation.request import FIELDS
from stable_diffusion.generation.strangers import LIMITS, LONGEST
from stable_diffusion.runtime import version
from stable_diffusion.serve.door import MOST_PIXELS, SETTINGS, Refused, Served
from stable_diffusion.serve.job import Job, Progress
from stable_diffusion.serve.jobs import MOST_WAITING, Jobs
from stable_diffusion.serve.replies import (
    SILENCE,
    Stream,
    address_of,
    data_uri,
    encoded,
    event,
    json_body,
    problem,
    server_of,
    submit,
)

FORMATS = ("png", "jpeg", "webp")
CLIENT = re.compile(r"[\w-]{1,64}", re.ASCII)
LOOK_AGAIN = 2.0
"""Seconds after which a job that waits is asked for its position."""


def error(status: int, message: str, field: str | None, headers: Mapping[str, str]) -> Response:
    """An error as ``{"error": {"message", "field"}}``."""
    return JSONResponse(
        {"error": {"message": message, "field": field}}, status_code=status, headers=dict(headers)
    )


async def models(request: Request) -> Response:
    """What can be asked for."""
    server = server_of(request)
    return JSONResponse(
        {
            "models": [
                _described(each, each is server.models.default, server.prompt_syntax)
                for each in server.models.all.values()
            ],
            "settings": list(SETTINGS),
            "samplers": list(SAMPLERS),
            "spacings": list(SPACINGS),
            "limits": {
                **LIMITS,
                "letters": LONGEST,
                "image_pixels": MOST_PIXELS,
                "waiting": MOST_WAITING,
            },
            "version": version(),
        }
    )


def _described(served: Served, default: bool, prompt_syntax: str) -> dict[str, Any]:
    config = served.config
    return {
        "name": served.name,
        "default": default,
        "packaged": served.packaged,
        "width": config.sample_size,
        "height": config.sample_size,
        "factor": config.vae.factor,
        "num_inference_steps": config.num_inference_steps,
        "guidance_scale": config.guidance.scale,
        "sampler": config.sampler.name,
        "spacing": config.sampler.spacing,
        "strength": FIELDS["strength"].default,
        "styles": {"words": list(config.styles.words), "default": config.styles.default},
        "prompts": list(config.prompts),
        "loras": served.loras,
        "alpha": config.alpha,
        "reads_text": bool(config.text_encoders),
        "prompt_syntax": prompt_syntax,
    }


async def create(request: Request) -> Response:
    """Takes a job into the queue."""
    added = await _submitted(request)
    place = server_of(request).jobs.position(added)
    return JSONResponse(
        {"id": added.id, "status": added.status, "position": place},
        status_code=202,
        headers={"Location": f"/api/jobs/{added.id}"},
    )


async def live(request: Request) -> Response:
    """Generates while somebody types: the answer is the stream of events, and who closes it wants no picture."""
    added, jobs = await _submitted(request, live=True), server_of(request).jobs
    return Stream(_events(jobs, added, inline=True), gone=partial(jobs.cancel, added))


async def _submitted(request: Request, live: bool = False) -> Job:
    """The job that a request's body asks for."""
    body, server = await json_body(request), server_of(request)
    served = server.models.named(body.pop("model", None))
    client, previews = body.pop("client", None), body.pop("previews", None)
    if not (isinstance(client, str) and CLIENT.fullmatch(client)):
        client = address_of(request)
    try:
        previews = typed(Annotated[int, within(0, 20)], 0 if previews is None else previews, "previews")
    except InputError as refused:
        raise Refused(str(refused), field="previews") from None
    if body.get("prompt_syntax") is None:
        body["prompt_syntax"] = server.prompt_syntax
    return await submit(request, served, body, client=client, previews=previews, live=live)


async def job(request: Request) -> Response:
    """What has become of a job; with DELETE, its end."""
    found, jobs = _job(request), server_of(request).jobs
    if request.method == "DELETE":
        jobs.cancel(found)
        return Response(status_code=204)
    status = found.status  # before the rest is read, which is complete when it says so
    progress = found.progress
    return JSONResponse(
        {
            "id": found.id,
            "status": status,
            "position": jobs.position(found),
            "step": progress.step,
            "total": progress.total,
            "pictures": [_picture(found, index) for index in range(len(found.pictures))],
            "notes": list(found.notes),
            "error": None if found.error is None else problem(found.error).message,
            "seconds": found.seconds,
        }
    )


async def picture(request: Request) -> Response:
    """One of a job's pictures."""
    pictures, index = _job(request).pictures, request.path_params["index"]
    format = request.query_params.get("format", "png")
    if format not in FORMATS:
        raise Refused(f"format must be one of {', '.join(FORMATS)}", field="format")
    if not re.fullmatch("[0-9]{1,3}", index) or int(index) >= len(pictures):
        raise Refused(
            f"the job has {len(pictures)} pictures so far, and none is {shown(index)}: numbers begin at 0",
            status=404,
        )
    content = await asyncio.to_thread(encoded, pictures[int(index)], format)
    # A job's picture never changes, and the job's id tells it to nobody else.
    headers = {"Cache-Control": "private, max-age=600, immutable"}
    return Response(content, media_type=f"image/{format}", headers=headers)


async def events(request: Request) -> Response:
    """What becomes of a job, as it happens. Who closes the stream still gets the job."""
    found = _job(request)
    if request.method == "HEAD":
        return Response(media_type="text/event-stream")
    return Stream(_events(server_of(request).jobs, found))


async def _events(jobs: Jobs, job: Job, inline: bool = False) -> AsyncGenerator[bytes, None]:
    """The events of a job, those that have been included.

    Args:
        jobs: where it waits.
        job: the job.
        inline: whether the pictures themselves are in the events, not their addresses.
    """
    sent, position, progress, spoke = 0, -1, Progress(), time.monotonic()
    async with aclosing(job.changes(every=LOOK_AGAIN)) as changes:
        async for _ in changes:
            over, now = job.over, job.progress  # before the rest is read
            said: list[bytes] = []
            if job.status == "queued" and (place := jobs.position(job)) != position:
                position = place
                said.append(event("queued", {"position": position}))
            for index in range(sent, len(pictures := job.pictures)):
                where = {"png": await asyncio.to_thread(data_uri, pictures[index])} if inline else {}
                said.append(event("picture", {"index": index, **_picture(job, index, not inline), **where}))
                sent += 1
            if not over and now.step and now is not progress:
                said.append(event("step", await _step(now, new=now.previewed != progress.previewed)))
                progress = now
            if over:
                said.append(_end(job))
            if not said and time.monotonic() - spoke > SILENCE:
                said.append(b": still here\n\n")
            if said:
                spoke = time.monotonic()
                yield b"".join(said)


async def _step(progress: Progress, new: bool) -> dict[str, Any]:
    data = {"step": progress.step, "total": progress.total, "picture": progress.picture}
    if not new or progress.preview is None:
        return data
    return data | {"preview": await asyncio.to_thread(data_uri, progress.preview, "webp", 80)}


def _end(job: Job) -> bytes:
    if job.status == "done":
        return event("done", {"notes": list(job.notes), "seconds": job.seconds})
    if job.error is not None:
        found = problem(job.error)
        return event("failed", {"error": found.message, "status": found.status})
    return event("cancelled", {})


def _picture(job: Job, index: int, addressed: bool = True) -> dict[str, Any]:
    picture: Image.Image = job.pictures[index]
    settings = picture.info["settings"]
    where = {"url": f"/api/jobs/{job.id}/pictures/{index}"} if addressed else {}
    return {
        **where,
        "seed": settings["seed"],
        "width": picture.width,
        "height": picture.height,
        "settings": settings,
    }


def _job(request: Request) -> Job:
    """The job in the path. Raises Refused, 404, where there is none."""
    found = server_of(request).jobs.get(request.path_params["id"])
    if found is None:
        raise Refused("there is no such job; one that is over is kept for 10 minutes", status=404)
    return found


ROUTES: list[Route] = [
    Route("/api/models", models),
    Route("/api/jobs", create, methods=["POST"]),
    Route("/api/jobs/{id}", job, methods=["GET", "DELETE"]),
    Route("/api/jobs/{id}/events", events),
    Route("/api/jobs/{id}/pictures/{index}", picture),
    Route("/api/live", live, methods=["POST"]),
]
