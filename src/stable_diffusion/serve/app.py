"""The application: one page and three surfaces over one queue of jobs, behind one guard."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from stable_diffusion.errors import InputError
from stable_diffusion.serve import native, openai, page, webui
from stable_diffusion.serve.guard import Guard, Rules
from stable_diffusion.serve.replies import ErrorForm, Server, problem, server_of

logger = logging.getLogger(__name__)

FORMS: dict[str, ErrorForm] = {"/v1": openai.error, "/sdapi": webui.error}
"""How errors look below a path; elsewhere as ours."""
MAX_BODY = 32 << 20


def health(request: Request) -> Response:
    """Says that the server answers, and how much waits; it needs no key."""
    jobs = server_of(request).jobs
    return JSONResponse({"status": "ok", "waiting": jobs.waiting, "running": jobs.running is not None})


ROUTES: list[Route] = [
    Route("/health", health),
    *native.ROUTES,
    *openai.ROUTES,
    *webui.ROUTES,
    *page.ROUTES,
]


def error_response(path: str, error: Exception) -> Response:
    """An error in the form of the surface that the path belongs to."""
    form = next((form for prefix, form in FORMS.items() if path.startswith(prefix)), native.error)
    if isinstance(error, HTTPException):
        return form(error.status_code, error.detail, None, error.headers or {})
    found = problem(error)
    return form(found.status, found.message, found.field, found.headers)


def _failed(request: Request, error: Exception) -> Response:
    if isinstance(error, ClientDisconnect):
        return Response(status_code=499)  # nobody reads it
    answer = error_response(request.url.path, error)
    if answer.status_code == 500:
        logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return answer


def application(server: Server, rules: Rules, more: Iterable[Route] = ()) -> Starlette:
    """The ASGI application.

    Args:
        server: what it answers from; its jobs end with the application.
        rules: who may ask.
        more: routes beside its own.
    """

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        server.jobs.close()

    handlers = dict.fromkeys((HTTPException, InputError, ClientDisconnect, Exception), _failed)
    app = Starlette(
        routes=[*ROUTES, *more],
        middleware=[Middleware(Guard, rules=rules, refuse=error_response)],
        exception_handlers=handlers,
        lifespan=lifespan,
        max_body_size=MAX_BODY,
    )
    app.state.server = server
    return app
