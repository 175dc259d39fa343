"""The application: one page and three surfaces over one queue of jobs, behind one guard."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from stable_diffusion.errors import InputError
from stable_diffusion.serve import native, openai, page, webui
from stable_diffusion.serve.guard import MAX_BODY, Guard, Rules
from stable_diffusion.serve.replies import ErrorForm, Server, problem, server_of

FORMS: dict[str, ErrorForm] = {"/v1": openai.error, "/sdapi": webui.error}
"""How errors look below a path; elsewhere as ours."""


async def health(request: Request) -> Response:
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


async def _failed(request: Request, error: Exception) -> Response:
    """The answer to what a route raised. A fault of ours is raised again behind it, so that it stands in the log."""
    if isinstance(error, ClientDisconnect):
        return Response(status_code=499)  # nobody reads it
    return error_response(request.url.path, error)


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

    app = Starlette(
        routes=[*ROUTES, *more],
        exception_handlers=dict.fromkeys((HTTPException, InputError, ClientDisconnect, Exception), _failed),
        lifespan=lifespan,
        max_body_size=MAX_BODY,
    )
    app.router.redirect_slashes = False
    app.state.server = server
    # Outside of Starlette's own middlewares, whose answers (413, 500) are guarded too.
    app.middleware_stack = Guard(app.build_middleware_stack(), rules=rules, refuse=error_response)
    return app
