"""The AUTOMATIC1111 surface, ``/sdapi/v1``: the part of it that programs which generate with a webui speak."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from stable_diffusion.diffusion.names import SAMPLERS
from stable_diffusion.generation.infotext import read_parameters
from stable_diffusion.generation.metadata import parameters
from stable_diffusion.serve.door import Refused, Served, read_picture
from stable_diffusion.serve.job import Job
from stable_diffusion.serve.replies import (
    Server,
    address_of,
    finished,
    in_base64,
    json_body,
    server_of,
    submit,
)
from stable_diffusion.serve.webui_fields import (
    CHOICE,
    ONLY_HIRES,
    check_only,
    flag,
    read,
    refusals,
    settings_of,
    spacings_of,
    unread,
)

BASE = "/sdapi/v1"
PREVIEWS = 4
"""Of a picture, from the time on when somebody asks how far it is."""
MOST_CHOICES = 1000


def error(status: int, message: str, field: str | None, headers: Mapping[str, str]) -> Response:
    """An error in A1111's form; its sentence names the field."""
    body = {"error": "HTTPException", "detail": message, "body": "", "errors": message}
    return JSONResponse(body, status_code=status, headers=dict(headers))


# Pictures.


async def txt2img(request: Request) -> Response:
    """Generates from a prompt."""
    return await _draw(request, with_images=False)


async def img2img(request: Request) -> Response:
    """Generates from a prompt and a picture."""
    return await _draw(request, with_images=True)


async def _draw(request: Request, *, with_images: bool) -> Response:
    server, client = server_of(request), _client(request)
    with refusals():
        body = await json_body(request)
        served = _chosen(server, client, settings_of(body).get(CHOICE))
        hidden = () if flag(body, "include_init_images") else ("init_images", "mask")
        fields = await asyncio.to_thread(
            read, body, served, syntax=server.prompt_syntax, with_images=with_images
        )
        job = await submit(request, served, fields, client=client)
        try:
            await finished(request, job)
        except Refused:
            if job.status != "cancelled" or not job.pictures:
                raise  # of an interrupted job those that were done are handed over
    ignored = unread(body, with_images=with_images)
    echo = {name: value for name, value in body.items() if name not in (*hidden, *ignored)}
    echo = json.loads(json.dumps(echo), parse_constant=lambda _: None)  # NaN, which the answer cannot hold
    files = await asyncio.to_thread(lambda: [in_base64(picture) for picture in job.pictures])
    names = ", ".join(name for name in ignored if name.replace(".", "").isidentifier() and name.isascii())
    info = json.dumps(_info(job, served, body))
    return JSONResponse(
        {"images": files, "parameters": echo, "info": info},
        headers={"x-minisd-ignored": names[:1000]} if names else {},
    )


def _info(job: Job, served: Served, body: Mapping[str, Any]) -> dict[str, Any]:
    """What A1111 says of pictures, beside them."""
    request, pictures, count = job.request, job.pictures, len(job.pictures)
    prompts, negatives = request.prompts[:count], request.negative_prompts[:count]
    settings = [picture.info["settings"] for picture in pictures]
    return {
        "prompt": prompts[0],
        "all_prompts": prompts,
        "negative_prompt": negatives[0],
        "all_negative_prompts": negatives,
        "seed": request.seeds[0],
        "all_seeds": request.seeds[:count],
        "subseed": settings[0].get("variation_seed", -1),
        "all_subseeds": [each.get("variation_seed", -1) for each in settings],
        "subseed_strength": settings[0].get("variation_strength", 0),
        "width": pictures[0].width,
        "height": pictures[0].height,
        "sampler_name": SAMPLERS[request.sampler].webui,
        "cfg_scale": request.guidance_scale,
        "steps": request.num_inference_steps,
        "batch_size": int(body.get("batch_size") or 1),
        "sd_model_name": served.name,
        "sd_model_hash": None,
        "denoising_strength": settings[0].get("strength", settings[0].get("hires_strength")),
        "infotexts": list(map(parameters, settings)),
        "index_of_first_image": 0,
        "styles": [],
        "extra_generation_params": {},
        "job_timestamp": _stamp(job),
        "comments": list(job.notes),
    }


async def png_info(request: Request) -> Response:
    """The settings in a picture's file, as text and one by one."""
    with refusals():
        body = await json_body(request)
        picture = await asyncio.to_thread(read_picture, body.get("image"), "image")
    texts = {key: value for key, value in picture.info.items() if isinstance(value, str)}
    text = texts.pop("parameters", "")
    return JSONResponse({"info": text, "items": texts, "parameters": read_parameters(text)})


# Jobs: each client, which is an address, sees and stops its own.


async def interrupt(request: Request) -> Response:
    """Ends the client's job in work, or the one that waits longest."""
    jobs = server_of(request).jobs
    for job in jobs.of(_client(request))[:1]:
        jobs.cancel(job)
    return JSONResponse({})


async def progress(request: Request) -> Response:
    """How far the client's job in work is; with its picture so far unless ``skip_current_image``."""
    jobs = server_of(request).jobs.of(_client(request))
    job = jobs[0] if jobs else None
    share, remaining, image, said = 0.0, 0.0, None, None
    if job is not None:
        now, said = job.progress, None if job.status == "running" else "waiting for other jobs"
        share = min(0.99, (now.picture + now.step / max(1, now.total)) / len(job.request.prompts))
        if job.started is not None and share:
            remaining = (time.time() - job.started) * (1 / share - 1)
        if request.query_params.get("skip_current_image", "").lower() not in ("1", "true"):
            job.previews = PREVIEWS
            if now.preview is not None:
                image = await asyncio.to_thread(in_base64, now.preview)
    told = {"current_image": image, "textinfo": said}
    return JSONResponse({"progress": share, "eta_relative": remaining, "state": _state(job), **told})


def _state(job: Job | None) -> dict[str, Any]:
    return {
        "skipped": False,
        "interrupted": False,
        "stopping_generation": False,
        "job": "" if job is None else job.id,
        "job_count": 0 if job is None else len(job.request.prompts),
        "job_timestamp": "0" if job is None else _stamp(job),
        "job_no": 0 if job is None else job.progress.picture,
        "sampling_step": 0 if job is None else job.progress.step,
        "sampling_steps": 0 if job is None else job.progress.total or job.request.num_inference_steps,
    }


# Options and lists.


async def options(request: Request) -> Response:
    """The options that mean something here, of which one can be set: the model, for the client that sets it."""
    server, client = server_of(request), _client(request)
    if request.method != "POST":
        name = _chosen(server, client).name
        return JSONResponse({CHOICE: name, "samples_format": "png"})
    with refusals():
        body = await json_body(request)
        check_only(body, {"samples_format": ("png",)})
        if body.get(CHOICE) is not None:
            name = _chosen(server, client, body[CHOICE]).name
            server.chosen.pop(client, None)
            server.chosen[client] = name
            for oldest in list(server.chosen)[:-MOST_CHOICES]:
                del server.chosen[oldest]
    return JSONResponse(None)


async def sd_models(request: Request) -> Response:
    """The models that were named at the start."""
    files = {"hash": None, "sha256": None, "config": None}
    names = server_of(request).models.all
    return JSONResponse([{"title": name, "model_name": name, **files, "filename": name} for name in names])


async def loras(request: Request) -> Response:
    """The LoRAs that were named at the start, for the client's model."""
    names = _chosen(server_of(request), _client(request)).loras
    return JSONResponse([{"name": name, "alias": name, "path": name, "metadata": {}} for name in names])


async def schedulers(request: Request) -> Response:
    """The spacings that the client's model can have."""
    rows = {"automatic": "Automatic", **spacings_of(_chosen(server_of(request), _client(request)))}
    plain = {"aliases": None, "default_rho": -1.0, "need_inner_model": False}
    return JSONResponse([{"name": name, "label": label, **plain} for name, label in rows.items()])


def _always(value: Any) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        return JSONResponse(value)

    return answer


LISTS: dict[str, Any] = {
    "samplers": [
        {"name": row.webui, "aliases": [name, *row.aliases], "options": {}} for name, row in SAMPLERS.items()
    ],
    "scripts": {"txt2img": [], "img2img": []},
    "upscalers": [{"name": "None", "model_name": None, "model_path": None, "model_url": None, "scale": 4.0}],
    "embeddings": {"loaded": {}, "skipped": {}},
    "cmd-flags": {},
    "face-restorers": [],
    "hypernetworks": [],
    "latent-upscale-modes": [{"name": name} for name in ONLY_HIRES["hr_upscaler"]],
    "prompt-styles": [],
    "realesrgan-models": [],
    "script-info": [],
    "sd-vae": [],
}
"""What is the same for all, and never changes; clients ask for it when they start."""


def _chosen(server: Server, client: str, name: Any = None) -> Served:
    """The model of that name, or where there is none the one that the client chose."""
    try:
        return server.models.named(server.chosen.get(client) if name is None else name)
    except Refused as refused:
        raise Refused(f"{CHOICE}: {refused}", status=422, field=CHOICE) from None


def _client(request: Request) -> str:
    return f"sdapi {address_of(request)}"


def _stamp(job: Job) -> str:
    return time.strftime("%Y%m%d%H%M%S", time.localtime(job.created))


ROUTES: list[Route] = [
    Route(f"{BASE}/txt2img", txt2img, methods=["POST"]),
    Route(f"{BASE}/img2img", img2img, methods=["POST"]),
    Route(f"{BASE}/png-info", png_info, methods=["POST"]),
    Route(f"{BASE}/interrupt", interrupt, methods=["POST"]),
    Route(f"{BASE}/skip", interrupt, methods=["POST"]),
    Route(f"{BASE}/progress", progress),
    Route(f"{BASE}/options", options, methods=["GET", "POST"]),
    Route(f"{BASE}/sd-models", sd_models),
    Route(f"{BASE}/loras", loras),
    Route(f"{BASE}/schedulers", schedulers),
    *(Route(f"{BASE}/{name}", _always(value)) for name, value in LISTS.items()),
    # Models stay loaded, and all that there is was loaded at the start.
    *(
        Route(f"{BASE}/{name}", _always(None), methods=["POST"])
        for name in ("refresh-checkpoints", "unload-checkpoint", "reload-checkpoint")
    ),
]
