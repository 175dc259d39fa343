"""The guard before every route: which hosts, which origins, which key; and the headers that browsers obey."""

from __future__ import annotations

import base64
import binascii
import secrets
from collections.abc import Callable
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stable_diffusion.serve.door import Refused

OPEN = ("/health",)
"""Paths that need no key."""
SECRET = "/v1/images/files/"
"""What follows this in a path is a secret itself, told to who had the key: a picture's address, which programs hand on
to others that have none."""
SAFE = ("GET", "HEAD")
MAX_BODY = 32 << 20
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
"""Of every answer that does not say otherwise itself."""
READABLE = "Location, Retry-After, X-Request-Id, X-Minisd-Ignored"
"""Headers that pages of allowed origins may read."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Who may ask."""

    hosts: frozenset[str]
    """Names in lower case, without ports, by which the server may be addressed: against DNS rebinding. The address that
    a connection came to is one too: no name of another's can lead a browser to send it."""
    key: str | None = None
    """What clients must know, as a Bearer token or as the password of Basic authentication."""
    origins: frozenset[str] = frozenset()
    """Other origins, such as ``https://example.org``, whose pages may ask."""


class Guard:
    """ASGI middleware around the whole application, so that its errors are guarded too.

    Args:
        app: the application.
        rules: who may ask.
        refuse: the answer, for a path, that an error is.
    """

    def __init__(self, app: ASGIApp, rules: Rules, refuse: Callable[[str, Exception], Response]) -> None:
        self.app, self.rules, self.refuse = app, rules, refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":  # the other kind, WebSocket, is not served
                await self.app(scope, receive, send)
            return
        asked = Headers(scope=scope)
        origin = asked.get("origin")
        allowed = origin is not None and origin in self.rules.origins

        async def headed(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                if self.rules.origins:
                    headers.add_vary_header("Origin")
                if allowed and origin is not None:
                    headers["Access-Control-Allow-Origin"] = origin
                    headers["Access-Control-Expose-Headers"] = READABLE
            await send(message)

        try:
            self._check_host(scope, asked)
            self._check_origin(scope, asked, allowed)
            if allowed and scope["method"] == "OPTIONS" and "access-control-request-method" in asked:
                return await _preflight(asked)(scope, receive, headed)
            keyless = scope["path"] in OPEN or scope["path"].startswith(SECRET)
            if not keyless and not self._knows_key(asked):
                said = "this server needs its key: send Authorization: Bearer KEY, or the key as the password"
                headers = {"WWW-Authenticate": 'Basic realm="minisd"'}
                raise Refused(said, status=401, headers=headers)
            length = asked.get("content-length", "0")
            if length.isdecimal() and int(length[:20]) > MAX_BODY:
                raise Refused(f"the body may have at most {MAX_BODY:,} bytes", status=413)
        except Refused as error:
            return await self.refuse(scope["path"], error)(scope, receive, headed)
        await self.app(scope, receive, headed)

    def _check_host(self, scope: Scope, asked: Headers) -> None:
        name = _name(asked.get("host", ""))
        server = scope.get("server")
        here = server[0].removeprefix("::ffff:") if server else None
        if name not in self.rules.hosts and name != here:
            raise Refused("this server does not go by this name: start it with --allow-host and the name")

    def _check_origin(self, scope: Scope, asked: Headers, allowed: bool) -> None:
        """Refuses what a page from elsewhere makes a browser send; other programs send neither header."""
        if allowed or scope["method"] in SAFE:
            return
        origin, site = asked.get("origin"), asked.get("sec-fetch-site", "none")
        is_own = origin is None or _is_of(origin, asked.get("host", ""))
        if not is_own or site not in ("same-origin", "none"):
            raise Refused("a page from another place asked: start the server with --allow-origin", status=403)

    def _knows_key(self, asked: Headers) -> bool:
        if self.rules.key is None:
            return True
        scheme, _, said = asked.get("authorization", "").partition(" ")
        given = said.strip().encode("latin-1")
        if scheme.lower() == "basic":
            try:
                given = base64.b64decode(given, validate=True).partition(b":")[2]
            except binascii.Error:
                return False
        elif scheme.lower() != "bearer":
            return False
        return secrets.compare_digest(given, self.rules.key.encode())


def _name(host: str) -> str:
    """A host without its port, in lower case; IPv6 without brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()


def _is_of(origin: str, host: str) -> bool:
    """Whether an origin is the host that is addressed; a proxy may have changed the scheme alone."""
    scheme, _, authority = origin.lower().partition("://")
    port = {"http": ":80", "https": ":443"}.get(scheme)
    return port is not None and authority.removesuffix(port) == host.lower().removesuffix(port)


def _preflight(asked: Headers) -> Response:
    """What a browser asks before a page of an allowed origin asks."""
    return Response(
        status_code=204,
        headers={
            "Access-Control-Allow-Methods": "GET, POST, DELETE",
            "Access-Control-Allow-Headers": asked.get("access-control-request-headers", ""),
            "Access-Control-Max-Age": "600",
        },
    )
