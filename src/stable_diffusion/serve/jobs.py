"""Jobs: one queue and one thread that generates, so that a picture has all cores and models need no locks."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Iterator
from time import monotonic, perf_counter, time

from stable_diffusion.errors import InputError
from stable_diffusion.files import lacks_memory
from stable_diffusion.generation.pipeline import NonFinite, Result, Steps
from stable_diffusion.serve.job import Job, Progress, Status, unchanged

logger = logging.getLogger(__name__)

MOST_WAITING = 64
MOST_BYTES = 256 << 20
"""Of the pictures that clients sent with jobs that wait."""
KEPT_SECONDS = 600
KEPT_BYTES = 64 << 20
"""Of finished jobs, with their pictures as they lie in memory."""
LONGEST_WAIT = 2.0
"""Seconds for which live jobs go before the others."""


class Busy(InputError):
    """More jobs wait than the queue takes, or the server is stopping.

    Attributes:
        retry_after: seconds after which to ask again.
        status: of HTTP.
    """

    def __init__(self, said: str, retry_after: int, status: int = 429) -> None:
        super().__init__(said)
        self.retry_after = retry_after
        self.status = status


class Jobs:
    """The queue, and the thread that generates what is in it.

    Live jobs go first, for at most ``LONGEST_WAIT`` seconds while others wait; those go in turns of their clients. A
    turn is a picture: a job of several makes way after each.
    """

    def __init__(self) -> None:
        self._live: OrderedDict[str, Job] = OrderedDict()
        self._waiting: OrderedDict[str, deque[Job]] = OrderedDict()
        self._known: dict[str, Job] = {}
        # With the moment on the clock, and bytes; the oldest first.
        self._over: deque[tuple[Job, float, int]] = deque()
        self._over_bytes = 0
        self._running: Job | None = None
        self._changed = threading.Condition()
        self._held_since: float | None = None
        self._closed = False
        self._pace = 1.0  # seconds a picture, on average of late
        self._thread = threading.Thread(target=self._work, name="drawing", daemon=True)
        self._thread.start()

    def add(self, job: Job) -> Job:
        """Puts a job into the queue. Raises Busy where it is full, or closed."""
        with self._changed:
            if self._closed:
                raise Busy("the server is stopping: ask again when it runs", 5, status=503)
            older = self._live.get(job.client) if job.live else None
            self._check_room(job, older)
            if job.live:
                self._live[job.client] = job  # at the older one's place
            else:
                self._waiting.setdefault(job.client, deque()).append(job)
            self._known[job.id] = job
            if older is not None:
                self._finish(older, "cancelled")
            self._changed.notify()
        return job

    def _check_room(self, job: Job, older: Job | None) -> None:
        waiting = [each for each in self._order() if each is not older]
        if len(waiting) < MOST_WAITING and sum(each.bytes for each in (*waiting, job)) <= MOST_BYTES:
            return
        seconds = max(1, min(600, round(sum(each.left for each in waiting) * self._pace)))
        what = f"{len(waiting)} jobs are waiting, which is the most"
        if len(waiting) < MOST_WAITING:
            what = f"the pictures of the {len(waiting)} jobs that are waiting take all the room there is"
        raise Busy(f"{what}: ask again in {seconds} seconds", seconds)

    def get(self, id: str) -> Job | None:
        """The job of that id; None where there is none, or none any more."""
        with self._changed:
            self._forget()
            return self._known.get(id)

    def cancel(self, job: Job) -> None:
        """Ends a job: at once where it waits, within a step where it is in work. One that is over stays as it is."""
        with self._changed:
            job.stop.set()
            if not job.over and job is not self._running:
                self._take_out(job)
                self._finish(job, "cancelled")

    def of(self, client: str) -> list[Job]:
        """A client's jobs that are not over, the oldest first."""
        with self._changed:
            return [job for job in self._known.values() if job.client == client and not job.over]

    def close(self, seconds: float = 30.0) -> None:
        """Ends every job, takes no more, and waits for the thread so long."""
        with self._changed:
            self._closed = True
            for job in [job for job in self._known.values() if not job.over]:
                self.cancel(job)
            self._changed.notify()
        self._thread.join(seconds)

    @property
    def waiting(self) -> int:
        """How many jobs wait."""
        with self._changed:
            return len(self._live) + sum(map(len, self._waiting.values()))

    @property
    def running(self) -> Job | None:
        """The job in work."""
        return self._running

    def position(self, job: Job) -> int:
        """How many jobs go before a job that waits; 0 for one that does not."""
        with self._changed:
            for before, each in enumerate(self._order()):
                if each is job:
                    return before + (self._running is not None)
            return 0

    # What follows runs in the thread, or holds the lock.

    def _order(self) -> Iterator[Job]:
        """The jobs that wait, as they would be taken if no more came and the live ones were quick."""
        yield from self._live.values()
        queues = [list(queue) for queue in self._waiting.values()]
        for turn in range(max(map(len, queues), default=0)):
            yield from (queue[turn] for queue in queues if turn < len(queue))

    def _next(self) -> Job | None:
        """The next job, and None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._live or self._waiting)
            if self._closed:
                return None
            if self._live and (not self._waiting or self._held() <= LONGEST_WAIT):
                _, job = self._live.popitem(last=False)
            else:
                client, queue = next(iter(self._waiting.items()))
                job = queue.popleft()
                self._waiting.move_to_end(client)
                if not queue:
                    del self._waiting[client]
                self._held_since = None
            self._running = job
            job.started = job.started or time()
            job.status = "running"
            job.changed()
            return job

    def _held(self) -> float:
        """For how many seconds live jobs have gone before others that wait."""
        now = monotonic()
        if self._held_since is None:
            self._held_since = now
        return now - self._held_since

    def _take_out(self, job: Job) -> None:
        if job.live:
            del self._live[job.client]
            return
        queue = self._waiting[job.client]
        queue.remove(job)
        if not queue:
            del self._waiting[job.client]
        if not self._waiting:
            self._held_since = None

    def _finish(self, job: Job, status: Status, error: Exception | None = None) -> None:
        job.request = dataclasses.replace(job.request, image=None, mask_image=None)
        job.finish = unchanged
        job.progress = dataclasses.replace(job.progress, preview=None)
        job.error = error
        job.finished = time()
        job.status = status  # last: who sees it sees the rest
        job.changed()
        if job.live:
            del self._known[job.id]
        else:
            self._over.append((job, monotonic(), size := _size(job)))
            self._over_bytes += size
        self._forget()

    def _forget(self) -> None:
        """Forgets finished jobs that are too old, and all but the newest where they are too large together."""
        oldest = monotonic() - KEPT_SECONDS
        while self._over:
            job, finished, size = self._over[0]
            if finished > oldest and (self._over_bytes <= KEPT_BYTES or len(self._over) == 1):
                break
            self._over.popleft()
            self._over_bytes -= size
            del self._known[job.id]

    def _work(self) -> None:
        while (job := self._next()) is not None:
            self._run(job)
            del job  # and its pictures, while the next one is awaited

    def _run(self, job: Job) -> None:
        """Generates the next picture of a job."""
        began = perf_counter()
        error: Exception | None = None
        try:
            self._draw(job)
        except Exception as fault:  # the next job has nothing to do with it
            if isinstance(fault, NonFinite):
                logger.error("a job failed: %s", fault)
            elif not isinstance(fault, InputError) and not lacks_memory(fault):
                logger.exception("a job failed")
            # What its frames hold, a network's activations, would stay for as long as the job.
            fault.__traceback__ = fault.__cause__ = fault.__context__ = None
            error = fault
        seconds = perf_counter() - began
        job.seconds += seconds
        with self._changed:
            self._running = None
            if error is not None:
                self._finish(job, "failed", error)
            elif job.stop.is_set():
                self._finish(job, "cancelled")
            else:
                self._pace += (seconds - self._pace) / 8
                self._put_back(job) if job.left else self._finish(job, "done")

    def _put_back(self, job: Job) -> None:
        """Lets a job wait for its next turn, before others of its client."""
        job.progress = Progress(picture=len(job.pictures), previewed=job.progress.previewed)
        if not job.live:
            self._waiting.setdefault(job.client, deque()).appendleft(job)
        elif job.client in self._live:  # a newer one
            self._finish(job, "cancelled")
        else:
            self._live[job.client] = job
            self._live.move_to_end(job.client, last=False)

    def _draw(self, job: Job) -> None:
        result = self._walk(job, job.model.stream(job.request.picture(len(job.pictures))))
        if result is None:
            return
        (picture,) = result.pictures
        settings = job.public(picture.info["settings"])
        picture = job.finish(picture)
        picture.info["settings"] = settings
        job.notes = tuple(dict.fromkeys((*job.notes, *result.notes)))
        job.pictures = [*job.pictures, picture]
        job.changed()

    def _walk(self, job: Job, steps: Steps) -> Result | None:
        """The result of a picture's steps; None where the job was stopped."""
        with contextlib.closing(steps):
            while not job.stop.is_set():
                try:
                    step = next(steps)
                except StopIteration as end:
                    result: Result = end.value
                    return result
                now = dataclasses.replace(job.progress, step=step.index + 1, total=step.total)
                if _is_previewed(now.step, now.total, job.previews):
                    # NaN: of the picture itself, `stream` knows what to do
                    with contextlib.suppress(InputError):
                        (preview,) = job.model.decode(step.x0)
                        now = dataclasses.replace(now, preview=preview, previewed=now.previewed + 1)
                job.progress = now
                job.changed()
        return None


def _is_previewed(step: int, total: int, previews: int) -> bool:
    """Whether so many previews, with the picture at the end, divide the steps evenly after this one."""
    parts = previews + 1
    return step < total and step * parts // total > (step - 1) * parts // total


def _size(job: Job) -> int:
    """Bytes in memory, about."""
    letters = sum(map(len, (*job.request.prompt, *job.request.negative_prompt)))
    return 4096 + 4 * letters + sum(each.width * each.height * len(each.getbands()) for each in job.pictures)
