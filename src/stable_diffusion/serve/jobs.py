"""Jobs: one queue and one thread that draws, so that a picture has all cores and models need no locks."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import threading
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from PIL import Image

from stable_diffusion.errors import InputError
from stable_diffusion.files import lacks_memory
from stable_diffusion.generation.pipeline import Result, Steps
from stable_diffusion.generation.request import Request

logger = logging.getLogger(__name__)

MOST_WAITING = 64
KEPT_SECONDS = 600
KEPT_BYTES = 64 << 20
"""Of finished jobs' pictures, as they lie in memory."""
LONGEST_WAIT = 2.0
"""Seconds for which live jobs go before the others."""

Status = Literal["queued", "running", "done", "failed", "cancelled"]


class Model(Protocol):
    """What draws: `DiffusionModel`."""

    def stream(self, request: Request) -> Steps: ...
    def decode(self, latents: Any, *, preview: bool = False) -> list[Image.Image]: ...


class Busy(InputError):
    """More jobs wait than the queue takes, or the server is closing.

    Attributes:
        retry_after: seconds after which to ask again.
    """

    def __init__(self, said: str, retry_after: int) -> None:
        super().__init__(said)
        self.retry_after = retry_after


@dataclass(eq=False, kw_only=True)
class Job:
    """Pictures that somebody asked for; all of it is read by any thread, and written by the one that draws."""

    model: Model
    request: Request
    """Its pictures are made one by one: each has the bytes that it has alone."""
    finish: Callable[[Image.Image], Image.Image] = lambda picture: picture
    """What becomes of each picture: scaling, say. Its ``info["settings"]`` stay."""
    client: str = ""
    """Clients take turns, whoever asked for how much."""
    live: bool = False
    """Goes before others; a newer one of the client takes its place while it waits."""
    previews: int = 0
    """How many steps of a picture are decoded too, evenly spread; 0 for none."""
    id: str = field(default_factory=lambda: secrets.token_urlsafe(12))
    status: Status = "queued"
    step: int = 0
    """Steps done, of the picture in work."""
    total: int = 0
    preview: Image.Image | None = None
    """What the network sees in the noise, at the model's own size."""
    previewed: int = 0
    """Previews so far."""
    pictures: list[Image.Image] = field(default_factory=list)
    notes: tuple[str, ...] = ()
    error: Exception | None = None
    created: float = field(default_factory=time.time)
    finished: float | None = None
    seconds: float = 0.0
    """Spent drawing."""
    _stop: threading.Event = field(default_factory=threading.Event)
    _watchers: dict[asyncio.Event, asyncio.AbstractEventLoop] = field(default_factory=dict)

    @property
    def over(self) -> bool:
        """Whether nothing of it will change any more."""
        return self.status in ("done", "failed", "cancelled")

    async def changes(self, every: float | None = None) -> AsyncIterator[None]:
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
                    await asyncio.wait_for(event.wait(), every)
        finally:
            del self._watchers[event]

    def _changed(self, **values: Any) -> None:
        for name, value in values.items():
            setattr(self, name, value)
        for event, loop in list(self._watchers.items()):
            with contextlib.suppress(RuntimeError):  # a loop that was closed
                loop.call_soon_threadsafe(event.set)


class Jobs:
    """The queue, and the thread that draws what is in it.

    Live jobs go first, for at most ``LONGEST_WAIT`` seconds while others wait; those others go in turns of their clients.
    """

    def __init__(self) -> None:
        self._live: OrderedDict[str, Job] = OrderedDict()
        self._waiting: OrderedDict[str, deque[Job]] = OrderedDict()
        self._kept: OrderedDict[str, Job] = OrderedDict()
        self._running: Job | None = None
        self._changed = threading.Condition()
        self._held_since: float | None = None
        self._closed = False
        self._pace = 1.0  # seconds a job, on average of late
        self._thread = threading.Thread(target=self._work, name="drawing", daemon=True)
        self._thread.start()

    def add(self, job: Job) -> Job:
        """Puts a job into the queue. Raises Busy where it is full, or closed."""
        with self._changed:
            if self._closed:
                raise Busy("the server is stopping: ask again when it runs", 5)
            if job.live:
                if older := self._live.pop(job.client, None):
                    self._finish(older, "cancelled")
                self._live[job.client] = job
            else:
                self._check_room()
                self._waiting.setdefault(job.client, deque()).append(job)
            self._kept[job.id] = job
            self._changed.notify()
        return job

    def _check_room(self) -> None:
        if (count := self.waiting) >= MOST_WAITING:
            seconds = max(1, min(600, round(count * self._pace)))
            raise Busy(
                f"{count} jobs are waiting, which is the most: ask again in {seconds} seconds", seconds
            )

    def get(self, id: str) -> Job | None:
        """The job of that id; None where there is none, or none any more."""
        with self._changed:
            self._forget()
            return self._kept.get(id)

    def cancel(self, job: Job) -> None:
        """Ends a job: at once where it waits, within a step where it is drawn. One that is over stays as it is."""
        with self._changed:
            job._stop.set()
            if job.status == "queued":
                self._take_out(job)
                self._finish(job, "cancelled")

    def cancel_all(self, client: str) -> None:
        """Ends all jobs of a client."""
        with self._changed:
            for job in [job for job in self._kept.values() if job.client == client and not job.over]:
                self.cancel(job)

    def close(self, seconds: float = 30.0) -> None:
        """Ends every job, takes no more, and waits for the thread."""
        with self._changed:
            self._closed = True
            for job in [job for job in self._kept.values() if not job.over]:
                self.cancel(job)
            self._changed.notify()
        self._thread.join(seconds)

    @property
    def waiting(self) -> int:
        """How many jobs wait that are not live."""
        return sum(map(len, self._waiting.values()))

    @property
    def running(self) -> Job | None:
        """The job in work."""
        return self._running

    def position(self, job: Job) -> int:
        """How many jobs go before a job that waits; 0 for one that does not."""
        with self._changed:
            order = [*self._live.values(), *self._in_turn()]
            return order.index(job) + (self._running is not None) if job in order else 0

    def _in_turn(self) -> Iterator[Job]:
        queues = [list(queue) for queue in self._waiting.values()]
        for turn in range(max(map(len, queues), default=0)):
            yield from (queue[turn] for queue in queues if turn < len(queue))

    # What follows runs in the thread, or holds the lock.

    def _next(self) -> Job | None:
        """The next job, and None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._live or self._waiting)
            if self._closed:
                return None
            now = time.monotonic()
            if self._live and self._waiting and self._held_since is None:
                self._held_since = now
            held = self._held_since is not None and now - self._held_since > LONGEST_WAIT
            if self._live and not (held and self._waiting):
                _, job = self._live.popitem(last=False)
            else:
                client = next(iter(self._waiting))
                job = self._waiting[client].popleft()
                self._waiting.move_to_end(client)
                if not self._waiting[client]:
                    del self._waiting[client]
                self._held_since = None
            self._running = job
            job._changed(status="running")
            return job

    def _take_out(self, job: Job) -> None:
        if job.live:
            self._live.pop(job.client, None)
        elif job in (queue := self._waiting[job.client]):
            queue.remove(job)
            if not queue:
                del self._waiting[job.client]

    def _finish(self, job: Job, status: Status, error: Exception | None = None) -> None:
        job._changed(status=status, error=error, finished=time.time(), preview=None)
        if job.live:
            self._kept.pop(job.id, None)
        self._forget()

    def _forget(self) -> None:
        """Forgets finished jobs that are too old, and all but the newest where their pictures are too large together."""
        over = sorted((job for job in self._kept.values() if job.over), key=lambda job: job.finished or 0.0)
        size = sum(_bytes(job) for job in over)
        for job in over:
            fits = size <= KEPT_BYTES or job is over[-1]
            if fits and time.time() - (job.finished or 0.0) < KEPT_SECONDS:
                break
            size -= _bytes(job)
            del self._kept[job.id]

    def _work(self) -> None:
        while (job := self._next()) is not None:
            began = time.perf_counter()
            status: Status = "failed"
            error: Exception | None = None
            try:
                status = "done" if self._draw(job) else "cancelled"
            except InputError as refused:
                error = refused
            except Exception as fault:  # the next job has nothing to do with it
                error = fault
                if not lacks_memory(fault):
                    logger.exception("a job failed")
            job.seconds = time.perf_counter() - began
            if status == "done":
                self._pace += (job.seconds - self._pace) / 8
            with self._changed:
                self._running = None
                self._finish(job, status, error)

    def _draw(self, job: Job) -> bool:
        """Draws the pictures of a job; False where it was cancelled."""
        for index in range(len(job.request.prompts)):
            steps = job.model.stream(job.request.picture(index))
            result = self._walk(job, steps)
            if result is None:
                return False
            (picture,) = result.pictures
            settings = picture.info["settings"]
            picture = job.finish(picture)
            picture.info["settings"] = settings
            notes = tuple(dict.fromkeys((*job.notes, *result.notes)))
            job._changed(pictures=[*job.pictures, picture], notes=notes, step=0, preview=None)
        return True

    def _walk(self, job: Job, steps: Steps) -> Result | None:
        with contextlib.closing(steps):
            while not job._stop.is_set():
                try:
                    step = next(steps)
                except StopIteration as end:
                    result: Result = end.value
                    return result
                done, preview = step.index + 1, job.preview
                if done < step.total and done * (job.previews + 1) // step.total > step.index * (
                    job.previews + 1
                ) // step.total:
                    (preview,) = job.model.decode(step.x0)
                    job.previewed += 1
                job._changed(step=done, total=step.total, preview=preview)
        return None


def _bytes(job: Job) -> int:
    return sum(picture.width * picture.height * len(picture.getbands()) for picture in job.pictures)
