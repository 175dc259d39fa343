"""A job: pictures that somebody asked for, and what has become of them."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import threading
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from time import time
from typing import Any, Literal, Protocol, TypeVar

from PIL import Image

from stable_diffusion.generation.pipeline import Steps
from stable_diffusion.generation.request import Request

T = TypeVar("T")
Status = Literal["queued", "running", "done", "failed", "cancelled"]


class Model(Protocol):
    """What generates: `DiffusionModel`."""

    def stream(self, request: Request) -> Steps: ...
    def decode(self, latents: Any, *, preview: bool = False) -> list[Image.Image]: ...


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a job is; one object, so that its parts belong together."""

    picture: int = 0
    """The one in work, from 0."""
    step: int = 0
    """Steps of it that are done."""
    total: int = 0
    """Steps that it takes; 0 before the first one."""
    preview: Image.Image | None = None
    """What the network sees in the noise, at the model's own size."""
    previewed: int = 0
    """Previews of the job so far."""


def unchanged(value: T) -> T:
    """The same."""
    return value


@dataclass(eq=False, kw_only=True)
class Job:
    """Pictures that somebody asked for; all of it is read by any thread, and written by the one that generates them."""

    model: Model
    request: Request
    """Its pictures are made one by one: each has the bytes that it has alone. When it is over, those to begin with
    are gone."""
    finish: Callable[[Image.Image], Image.Image] = unchanged
    """What becomes of each picture: scaling, say."""
    public: Callable[[dict[str, Any]], dict[str, Any]] = unchanged
    """What clients may know of the settings that each picture has in ``info["settings"]``."""
    bytes: int = 0
    """Of the pictures to begin with, as they lie in memory."""
    client: str = ""
    """Clients take turns, whoever asked for how much."""
    live: bool = False
    """Goes before others; a newer one of the client takes its place while it waits."""
    previews: int = 0
    """How many steps of a picture are decoded too, evenly spread; 0 for none. Any thread may change it on the way."""
    id: str = field(default_factory=lambda: secrets.token_urlsafe(12))
    status: Status = "queued"
    progress: Progress = Progress()
    pictures: list[Image.Image] = field(default_factory=list)
    """Those that are done, also of a job that was cancelled."""
    notes: tuple[str, ...] = ()
    error: Exception | None = None
    created: float = field(default_factory=time)
    started: float | None = None
    finished: float | None = None
    seconds: float = 0.0
    """Spent generating."""
    stop: threading.Event = field(default_factory=threading.Event)
    """Set where it is to end."""
    _watchers: dict[asyncio.Event, asyncio.AbstractEventLoop] = field(default_factory=dict)

    @property
    def over(self) -> bool:
        """Whether nothing of it will change any more."""
        return self.status in ("done", "failed", "cancelled")

    @property
    def left(self) -> int:
        """Pictures that are still to be generated."""
        return len(self.request.prompts) - len(self.pictures)

    async def changes(self, every: float | None = None) -> AsyncGenerator[None, None]:
        """Yields now and after each change, of which several may come as one, until it is over.

        Args:
            every: yields after so many seconds without a change too.
        """
        event, loop = asyncio.Event(), asyncio.get_running_loop()
        self._watchers[event] = loop
        try:
            while True:
                event.clear()
                over = self.over
                yield
                if over:
                    return
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(every):
                        await event.wait()
        finally:
            del self._watchers[event]

    def changed(self) -> None:
        """Tells who watches."""
        for event, loop in list(self._watchers.items()):
            with contextlib.suppress(RuntimeError):  # a loop that was closed
                loop.call_soon_threadsafe(event.set)
