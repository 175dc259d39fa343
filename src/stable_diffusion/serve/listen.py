"""From a free port to the last answer: uvicorn, set up for this application."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import logging
import os
import socket
from collections.abc import Callable, Iterator
from time import monotonic
from typing import TYPE_CHECKING, Any

import uvicorn

from stable_diffusion.errors import InputError

if TYPE_CHECKING:  # what listens is known before torch is imported
    from starlette.applications import Starlette

    from stable_diffusion.serve.jobs import Jobs

logger = logging.getLogger(__name__)

GRACE = 10
"""Seconds for answers that are being sent when the server stops."""
PROXIES = ("127.0.0.1", "::1")
"""Where a proxy is believed, whatever the environment says."""

AGAIN = 60.0
"""Seconds after which it is said again that no more connections can be taken."""


class Listener(uvicorn.Server):
    """Answers until ``should_exit`` is set; every job ends then, within a step, and so does what waits for it.

    Signals are the caller's.

    Args:
        app: the application.
        jobs: its jobs.
        ready: called when it answers.
        proxied: whether a proxy on this machine says whose requests it hands on.
    """

    def __init__(
        self,
        app: Starlette,
        jobs: Jobs,
        ready: Callable[[], object] = lambda: None,
        *,
        proxied: bool = False,
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                loop="asyncio",
                http="h11",
                ws="none",
                lifespan="on",
                log_config=None,  # errors go where Python's log goes
                log_level="warning",
                access_log=False,
                server_header=False,
                # Where no proxy overwrites them, a client could take another's address, and end its jobs.
                proxy_headers=proxied,
                forwarded_allow_ips=[*PROXIES],
                timeout_graceful_shutdown=GRACE,
                h11_max_incomplete_event_size=32 << 10,  # of a request's line and headers
            )
        )
        self._jobs, self._ready = jobs, ready
        self._said_full = -AGAIN

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves them as they are."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begins to answer."""
        asyncio.get_running_loop().set_exception_handler(self.failed)
        await super().startup(sockets)
        self._ready()

    def failed(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Says what went wrong in the loop, but not thousands of times a second that files have run out."""
        error = context.get("exception")
        if not isinstance(error, OSError) or error.errno not in (errno.EMFILE, errno.ENFILE):
            loop.default_exception_handler(context)
        elif monotonic() - self._said_full >= AGAIN:
            self._said_full = monotonic()
            logger.warning("new clients wait until others are gone: %s", error.strerror)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Ends the jobs, for whose answers it then waits."""
        self._jobs.close(0)
        await super().shutdown(sockets)


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens: what asks from now on is answered when there is who answers.

    Raises:
        InputError: no such address here, or the port is taken or not allowed.
    """
    if not 0 <= port <= 65_535:
        raise InputError(f"port must be from 0 to 65535, got {port}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        said = getattr(error, "strerror", None) or error
        raise InputError(f"this machine has no address {host!r} ({said}): give another --host") from None
    listening = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":  # on Windows it would let two programs have one port
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(2048)
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRINUSE:
            raise InputError(
                f"port {port} is in use, perhaps by another minisd serve: give another --port"
            ) from None
        said = error.strerror or error
        raise InputError(
            f"cannot listen at {host} on port {port}: {said}; give another --host or --port"
        ) from None
    return listening


def is_loopback(listening: socket.socket) -> bool:
    """Whether only programs of this machine reach a socket."""
    return ipaddress.ip_address(listening.getsockname()[0].partition("%")[0]).is_loopback
