"""The OpenAI surface, ``/v1``."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.responses import JSONResponse, Response
from starlette.routing import Route


def error(status: int, message: str, field: str | None, headers: Mapping[str, str]) -> Response:
    """An error as ``{"error": {"message", "field"}}``."""
    return JSONResponse(
        {"error": {"message": message, "field": field}}, status_code=status, headers=dict(headers)
    )


ROUTES: list[Route] = []
