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
SAFE = ("GET", "HEAD")
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Who may ask."""

    hosts: frozenset[str]
    """Names, without ports, by which the server may be addressed: against DNS rebinding."""
    key: str | None = None
    """What clients must know, as a Bearer token or as the password of Basic authentication."""
    origins: frozenset[str] = frozenset()
    """Other origins, such as ``https://example.org``, whose pages may ask."""
