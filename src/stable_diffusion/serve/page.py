"""The page and the description of the surfaces: files of the package, read once; no path from a client meets a disk."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

FOLDER = Path(__file__).parent
TYPES = {
    ".css": "text/css",
    ".html": "text/html",
    ".js": "text/javascript",
    ".json": "application/json",
    ".svg": "image/svg+xml",
}


@dataclass(frozen=True)
class File:
    """A file as it is served."""

    content: bytes
    type: str
    etag: str


def _read(path: Path) -> File:
    content = path.read_bytes()
    return File(content, TYPES[path.suffix], f'"{hashlib.sha256(content).hexdigest()[:20]}"')


FILES = {"/openapi.json": _read(FOLDER / "openapi.json")} | {
    f"/{path.relative_to(FOLDER / 'static').as_posix()}".replace("/index.html", "/"): _read(path)
    for path in sorted((FOLDER / "static").rglob("*.*"))
}
"""By the paths under which they are served."""


async def file(request: Request) -> Response:
    """The file of a path, or that it has not changed."""
    found = FILES[request.scope["path"]]
    headers = {"ETag": found.etag, "Cache-Control": "no-cache"}
    known = request.headers.get("if-none-match", "").split(",")
    if found.etag in (tag.strip().removeprefix("W/") for tag in known):
        return Response(status_code=304, headers=headers)
    return Response(found.content, media_type=found.type, headers=headers)


ROUTES: list[Route] = [Route(path, file) for path in FILES]
