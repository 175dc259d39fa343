"""What serving costs: many askers at once, beside a bare loop over the same pictures in the same run.

    python benchmarks/serving.py [--askers 64] [--rounds 2] [--starts 5] [--quick]

`minisd serve` runs as a process of its own, with the package's model. Each asker is a client that asks for a picture,
follows its events, fetches it, and asks again; meanwhile somebody asks five times a second whether the server is well.
Every few seconds the server is halted, and the bare loop draws pictures and packs them as PNG: a processor's speed may
change by a third from one minute to the next. `--quick` is small and judges nothing: it shows that the parts work, not
what they cost.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from stable_diffusion import DiffusionModel
from stable_diffusion.serve.replies import encoded

PROMPT = "a fox, noto style"
LIMITS = {"start": 3.0, "ratio": 0.95, "health": 50.0}
"""Seconds, a part of the bare loop's pictures a second, milliseconds."""
SLICE = 4.0
"""Seconds of each in turn."""


@contextlib.contextmanager
def served() -> Iterator[tuple[subprocess.Popen[str], int, float]]:
    """A server, its port, and the seconds until it said that it is there."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "stable_diffusion", "serve", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8", env=dict(os.environ)) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            seconds = time.perf_counter() - began
            (port,) = re.findall(r":(\d+)$", line.strip())
            yield process, int(port), seconds
        finally:
            process.terminate()
            process.wait()


def ask(connection: http.client.HTTPConnection, method: str, path: str, body: Any = None) -> bytes:
    """The body of an answer. Raises RuntimeError where it is an error."""
    sent = None if body is None else json.dumps(body)
    connection.request(method, path, sent, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    content = answer.read()
    if answer.status >= 400:
        raise RuntimeError(f"{answer.status}: {content[:200]!r}")
    return content


@dataclass
class Askers:
    """Clients that all ask at once, and what they see.

    Attributes:
        ended: when each picture came, by asker.
        health: seconds that each look at the server's health took.
        halted: set while the server is.
    """

    port: int
    count: int
    rounds: int
    steps: int
    ended: list[list[float]] = field(default_factory=list)
    health: list[float] = field(default_factory=list)
    halted: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        """Asks until each has its pictures."""
        self.ended = [[] for _ in range(self.count)]
        over = threading.Event()
        threads = [threading.Thread(target=self._ask, args=(i,)) for i in range(self.count)]
        watch = threading.Thread(target=self._watch, args=(over,))
        for thread in (*threads, watch):
            thread.start()
        for thread in threads:
            thread.join()
        over.set()
        watch.join()

    def _ask(self, number: int) -> None:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port)) as connection:
            for turn in range(self.rounds):
                body = {"prompt": PROMPT, "seed": number * self.rounds + turn, "client": f"asker-{number}"}
                job = json.loads(
                    ask(connection, "POST", "/api/jobs", {**body, "num_inference_steps": self.steps})
                )
                events = ask(connection, "GET", f"/api/jobs/{job['id']}/events")
                if b"event: done" not in events:
                    raise RuntimeError(f"no picture: {events[-200:]!r}")
                ask(connection, "GET", f"/api/jobs/{job['id']}/pictures/0")
                self.ended[number].append(time.perf_counter())

    def _watch(self, over: threading.Event) -> None:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port)) as connection:
            while not over.wait(0.2):
                began, halted = time.perf_counter(), self.halted.is_set()
                ask(connection, "GET", "/health")
                if not halted and not self.halted.is_set():
                    self.health.append(time.perf_counter() - began)

    def lead(self) -> int:
        """How many pictures the luckiest asker had more than the unluckiest when it had all of its own."""
        first = min(times[-1] for times in self.ended)
        return self.rounds - min(sum(time <= first for time in times) for times in self.ended)


def bare(model: DiffusionModel, seeds: Iterable[int], steps: int) -> None:
    """Pictures in a loop."""
    for seed in seeds:
        for picture in model.generate(PROMPT, seed=seed, num_inference_steps=steps):
            encoded(picture)


def in_turn(crowd: Askers, process: subprocess.Popen[str], model: DiffusionModel) -> tuple[float, float]:
    """Pictures a second of the askers, and of the bare loop."""
    looped, looping, asking = 0, 0.0, 0.0
    asked = threading.Thread(target=crowd.run)
    asked.start()
    while asked.is_alive():
        began = time.perf_counter()
        asked.join(SLICE)
        crowd.halted.set()
        process.send_signal(signal.SIGSTOP)
        halted = time.perf_counter()
        while (now := time.perf_counter()) < halted + SLICE:
            bare(model, [looped], crowd.steps)
            looped += 1
        asking, looping = asking + halted - began, looping + now - halted
        process.send_signal(signal.SIGCONT)
        crowd.halted.clear()
    return crowd.count * crowd.rounds / asking, looped / looping


def judged(said: str, good: bool, limit: str, quick: bool) -> str:
    return said if quick else f"{said}, limit {limit}: {'ok' if good else 'MISSED'}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--askers", type=int, default=64, help="at most 64: more are asked to come again")
    parser.add_argument("--rounds", type=int, default=2, help="pictures of each, one after the other")
    parser.add_argument("--starts", type=int, default=5)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(arguments)
    quick = options.quick
    askers, rounds, starts = (4, 2, 1) if quick else (options.askers, options.rounds, options.starts)

    model = DiffusionModel.from_pretrained()
    steps = 1 if quick else model.config.num_inference_steps
    started = []
    for _ in range(starts - 1):
        with served() as (_, _, seconds):
            started.append(seconds)
    with served() as (process, port, seconds):
        started.append(seconds)
        bare(model, range(2), steps)
        Askers(port, 2, 1, steps).run()
        crowd = Askers(port, askers, rounds, steps)
        crowded, loop = in_turn(crowd, process, model)

    print(
        f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, {os.cpu_count()} cores"
    )
    start = statistics.median(started)
    said = f"start                {start:6.2f} s  ({min(started):.2f} to {max(started):.2f}, {starts} runs)"
    print(judged(said, start <= LIMITS["start"], f"{LIMITS['start']} s", quick))
    print(f"bare loop            {loop:6.2f} pictures a second  (of {steps} steps)")
    said = f"{askers:2} askers at once    {crowded:6.2f} pictures a second, {crowded / loop:.3f} of the bare loop"
    print(judged(said, crowded / loop >= LIMITS["ratio"], str(LIMITS["ratio"]), quick))
    health = sorted(1000 * seconds for seconds in crowd.health) or [0.0]
    late = health[int(0.99 * (len(health) - 1))]
    said = f"/health              {statistics.median(health):6.1f} ms, p99 {late:.1f} ms, {len(health)} times"
    print(judged(said, late < LIMITS["health"], f"{LIMITS['health']} ms", quick))
    lead = crowd.lead()
    print(judged(f"lead of the luckiest {lead:6d} pictures", lead <= 1, "1", quick))


if __name__ == "__main__":
    main()
