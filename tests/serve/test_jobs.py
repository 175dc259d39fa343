"""Laws of the queue, on a tiny model that takes its steps when the test lets it."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from PIL import Image

from stable_diffusion.errors import InputError
from stable_diffusion.serve import jobs as queue
from stable_diffusion.serve.job import Job
from stable_diffusion.serve.jobs import Busy, Jobs
from tests.serve.served import Gated, gated_job, until
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


@pytest.fixture
def gated(model: Any) -> Gated:
    return Gated(model)


@pytest.fixture
def jobs(gated: Gated) -> Iterator[Jobs]:
    made = Jobs()
    yield made
    gated.let(1000)
    made.close()


def begin(jobs: Jobs, gated: Gated, prompt: str = "first", **settings: Any) -> Job:
    """A job that is drawn, and waits for its step."""
    job = jobs.add(gated_job(gated, prompt, **settings))
    until(lambda: gated.drawn == [prompt])
    return job


def finish(jobs: Jobs, gated: Gated, *added: Job) -> list[str]:
    """The order in which all jobs were begun."""
    gated.let(100)
    until(lambda: all(job.over for job in added))
    return gated.drawn


def test_clients_take_turns(jobs: Jobs, gated: Gated) -> None:
    """Whoever asked for how much; and each job knows how many go before it."""
    begin(jobs, gated)
    asked = ["a1", "a2", "a3", "b1", "b2", "c1"]
    added = [jobs.add(gated_job(gated, prompt, client=prompt[0])) for prompt in asked]
    turns = ["a1", "b1", "c1", "a2", "b2", "a3"]
    assert [jobs.position(added[asked.index(prompt)]) for prompt in turns] == [1, 2, 3, 4, 5, 6]
    assert finish(jobs, gated, *added) == ["first", *turns]


def test_a_job_of_several_pictures_makes_way(
    jobs: Jobs, gated: Gated, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each: for other clients, and for who types; a later job of its client waits for all of them."""
    monkeypatch.setattr(queue, "LONGEST_WAIT", 600.0)
    request = gated.request("many", seed=0, num_inference_steps=1, num_images_per_prompt=3)
    many = jobs.add(Job(model=gated, request=request, client="a"))
    until(lambda: gated.drawn == ["many"])
    added = [jobs.add(gated_job(gated, name, client=name[0])) for name in ("b1", "b2", "a2")]
    added.append(jobs.add(gated_job(gated, "live", client="c", live=True)))
    assert many.left == 3
    order = finish(jobs, gated, many, *added)
    assert order == ["many", "live", "b1", "many", "b2", "many", "a2"]
    assert [picture.info["settings"]["seed"] for picture in many.pictures] == [0, 1, 2]


def test_a_job_that_made_way_can_be_cancelled(jobs: Jobs, gated: Gated) -> None:
    """At once, with the pictures that it has; and a newer live one takes the place of an older's rest."""
    many = gated.request("many", seed=0, num_inference_steps=1, num_images_per_prompt=3)
    kept = jobs.add(Job(model=gated, request=many, client="a"))
    until(lambda: gated.drawn == ["many"])
    other = jobs.add(gated_job(gated, "other", client="b"))
    gated.let(2)
    until(lambda: gated.drawn == ["many", "other"])
    assert kept.status == "running" and len(kept.pictures) == 1
    jobs.cancel(kept)
    assert kept.status == "cancelled" and jobs.waiting == 0
    live = jobs.add(Job(model=gated, request=many, client="page", live=True))
    gated.let(2)
    until(lambda: gated.drawn[2:] == ["many"])
    newer = jobs.add(gated_job(gated, "newer", client="page", live=True))
    assert finish(jobs, gated, other, live, newer)[3:] == ["newer"]
    assert (live.status, len(live.pictures), newer.status) == ("cancelled", 1, "done")


def test_live_jobs_go_first(jobs: Jobs, gated: Gated, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "LONGEST_WAIT", 600.0)
    begin(jobs, gated)
    kept = jobs.add(gated_job(gated, "kept"))
    added = [jobs.add(gated_job(gated, f"live {name}", client=name, live=True)) for name in "ab"]
    assert [jobs.position(job) for job in (*added, kept)] == [1, 2, 3]
    assert finish(jobs, gated, *added, kept) == ["first", "live a", "live b", "kept"]


def test_live_jobs_starve_nobody(jobs: Jobs, gated: Gated, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits while live jobs come and come is drawn when they went before for so long; then they go first again."""
    assert queue.LONGEST_WAIT == 2.0
    clock = [100.0]
    monkeypatch.setattr(queue, "monotonic", lambda: clock[0])
    begin(jobs, gated)
    kept = [jobs.add(gated_job(gated, f"kept {i}")) for i in range(2)]
    order = ["live 0", "live 1", "kept 0", "live 2", "live 3", "kept 1", "live 4"]
    added = jobs.add(gated_job(gated, "live 0", client="0", live=True))
    for i, expected in enumerate(order):
        gated.let(2)  # the step, and the end
        until(lambda: len(gated.drawn) == i + 2)  # noqa: B023
        assert gated.drawn[-1] == expected
        if expected.startswith("live") and expected != "live 4":
            number = int(expected[-1]) + 1
            added = jobs.add(gated_job(gated, f"live {number}", client=str(number), live=True))
            clock[0] += 1.9 if number % 2 else 0.2
    finish(jobs, gated, added, *kept)


def test_the_newest_live_job_of_a_client_wins(jobs: Jobs, gated: Gated) -> None:
    """At the place of the one that it replaces; the one in work goes on."""
    first = begin(jobs, gated, live=True, client="page")
    older = jobs.add(gated_job(gated, "older", live=True, client="page"))
    other = jobs.add(gated_job(gated, "other", live=True, client="other"))
    newer = jobs.add(gated_job(gated, "newer", live=True, client="page"))
    assert older.status == "cancelled" and jobs.waiting == 2
    assert finish(jobs, gated, newer, other) == ["first", "newer", "other"]
    assert first.status == "done"
    assert jobs.get(newer.id) is None, "nobody asks for it again"


def test_64_wait_and_no_more(jobs: Jobs, gated: Gated) -> None:
    begin(jobs, gated)
    added = [jobs.add(gated_job(gated, "a", client=str(i), live=i % 8 == 0)) for i in range(64)]
    for live in (False, True):
        with pytest.raises(Busy, match="64 jobs are waiting") as refused:
            jobs.add(gated_job(gated, "b", live=live, client="new"))
        assert refused.value.status == 429 and 1 <= refused.value.retry_after <= 600
    jobs.add(gated_job(gated, "b", live=True, client="0"))  # in place of one that waits
    jobs.cancel(added[1])
    jobs.add(gated_job(gated, "b"))


def test_pictures_that_wait_fill_no_memory(jobs: Jobs, gated: Gated) -> None:
    begin(jobs, gated)
    jobs.add(gated_job(gated, "a", bytes=200 << 20))
    with pytest.raises(Busy, match="take all the room"):
        jobs.add(gated_job(gated, "b", bytes=100 << 20))
    jobs.add(gated_job(gated, "b"))


def test_cancelling_one_touches_no_other(jobs: Jobs, gated: Gated) -> None:
    """Neither the one in work, nor one that waits; and one that is over stays what it is."""
    first = begin(jobs, gated)
    second, third = (jobs.add(gated_job(gated, name, client="a")) for name in ("second", "third"))
    jobs.cancel(second)
    assert second.status == "cancelled" and (first.status, third.status) == ("running", "queued")
    jobs.cancel(first)
    finish(jobs, gated, first, third)
    assert (first.status, third.status) == ("cancelled", "done") and first.pictures == []
    jobs.cancel(third)
    assert third.status == "done" and len(third.pictures) == 1
    assert gated.drawn == ["first", "third"]


def test_a_cancelled_job_keeps_what_it_has(jobs: Jobs, gated: Gated) -> None:
    request = gated.request("a", seed=0, num_inference_steps=1, num_images_per_prompt=3)
    job = jobs.add(Job(model=gated, request=request))
    gated.let(2)
    until(lambda: job.pictures)
    jobs.cancel(job)
    gated.let(2)
    until(lambda: job.over)
    assert job.status == "cancelled" and len(job.pictures) == 1


def test_cancelled_while_it_is_finished(jobs: Jobs, gated: Gated) -> None:
    """In the moment between the last step and the end; who cancelled is told so."""
    finishing, go = threading.Event(), threading.Event()

    def finish(picture: Image.Image) -> Image.Image:
        finishing.set()
        assert go.wait(60)
        return picture

    job = jobs.add(gated_job(gated, "a", finish=finish))
    gated.let(2)
    assert finishing.wait(60)
    jobs.cancel(job)
    go.set()
    until(lambda: job.over)
    assert job.status == "cancelled"


def test_the_jobs_of_a_client(jobs: Jobs, gated: Gated) -> None:
    first = begin(jobs, gated, client="a")
    mine, other = (jobs.add(gated_job(gated, name, client=name)) for name in ("a", "b"))
    assert jobs.of("a") == [first, mine]
    for job in jobs.of("a"):
        jobs.cancel(job)
    finish(jobs, gated, first, mine, other)
    assert jobs.of("a") == []
    assert [job.status for job in (first, mine, other)] == ["cancelled", "cancelled", "done"]


def test_closing_ends_all_and_takes_no_more(gated: Gated) -> None:
    jobs = Jobs()
    first = begin(jobs, gated)
    second = jobs.add(gated_job(gated, "second"))
    closing = threading.Thread(target=jobs.close)
    closing.start()
    until(lambda: second.status == "cancelled")
    with pytest.raises(Busy, match="stopping") as refused:
        jobs.add(gated_job(gated, "third"))
    assert refused.value.status == 503
    gated.let()
    closing.join(60)
    assert first.status == "cancelled" and not closing.is_alive()


def test_finished_jobs_are_forgotten_after_ten_minutes(
    jobs: Jobs, gated: Gated, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert queue.KEPT_SECONDS == 600
    gated.let(100)
    clock = [100.0]
    monkeypatch.setattr(queue, "monotonic", lambda: clock[0])
    first, second = (gated_job(gated, name) for name in "ab")
    jobs.add(first)
    until(lambda: first.over)
    clock[0] += 599
    assert jobs.get(first.id) is first
    jobs.add(second)
    until(lambda: second.over)
    clock[0] += 2
    assert jobs.get(first.id) is None and jobs.get(second.id) is second


def test_finished_jobs_are_forgotten_when_they_are_large(
    jobs: Jobs, gated: Gated, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oldest first; the newest stays, however large."""
    assert queue.KEPT_BYTES == 64 << 20
    monkeypatch.setattr(queue, "KEPT_BYTES", 2 * 32 * 32 * 3 + 2 * 5000)
    gated.let(100)
    added = []
    for name in "abcd":
        added.append(jobs.add(gated_job(gated, name)))
        until(lambda: added[-1].over)
    assert [jobs.get(job.id) is not None for job in added] == [False, False, True, True]
    large = jobs.add(gated_job(gated, "e", finish=lambda picture: picture.resize((100, 100))))
    until(lambda: large.over)
    assert [jobs.get(job.id) is not None for job in (*added, large)] == [False, False, False, False, True]


def test_what_is_over_holds_no_pictures_to_begin_with(jobs: Jobs, gated: Gated) -> None:
    gated.let(100)
    image = Image.new("RGB", (32, 32))
    gone = weakref.ref(image)
    request = gated.request("a", image=image, num_inference_steps=1)
    job = jobs.add(Job(model=gated, request=request, finish=lambda picture, kept=image: picture))
    until(lambda: job.over)
    assert job.status == "done"
    del image, request
    gc.collect()
    assert gone() is None


def test_a_fault_ends_its_job_alone(jobs: Jobs, gated: Gated, caplog: pytest.LogCaptureFixture) -> None:
    """And stands in the log, unless it is no fault of ours; its tensors do not outlive it."""
    seen: list[weakref.ref[torch.Tensor]] = []

    def failing(error: Exception) -> Any:
        def finish(_: Image.Image) -> Image.Image:
            held = torch.zeros(3)
            seen.append(weakref.ref(held))
            raise error

        return finish

    gated.let(100)
    errors = [ValueError("a fault"), InputError("a refusal"), MemoryError()]
    with caplog.at_level(logging.DEBUG):
        added = [jobs.add(gated_job(gated, "a", finish=failing(error))) for error in errors]
        added.append(jobs.add(gated_job(gated, "b")))
        until(lambda: all(job.over for job in added))
    assert [job.status for job in added] == ["failed", "failed", "failed", "done"]
    assert [job.error for job in added] == [*errors, None]
    assert [record.exc_info is not None for record in caplog.records] == [True]
    gc.collect()
    assert [ref() for ref in seen[1:]] == [None] * 2  # the first one's is held by pytest's log


@pytest.mark.parametrize(
    ("total", "previews", "steps"),
    [
        (8, 0, []),
        (8, 1, [4]),
        (8, 3, [2, 4, 6]),
        (4, 20, [1, 2, 3]),
        (10, 3, [3, 5, 8]),
        (1, 3, []),
        (2, 1, [1]),
    ],
)
def test_previews_are_spread_evenly(
    jobs: Jobs, gated: Gated, total: int, previews: int, steps: list[int]
) -> None:
    """None at the end, where the picture is."""
    request = gated.request("a", seed=0, num_inference_steps=total, num_images_per_prompt=2)
    job = jobs.add(Job(model=gated, request=request, previews=previews))
    found = []
    for picture in range(2):
        for step in range(1, total + 1):
            before = job.progress.previewed
            gated.let()
            until(lambda: (job.progress.picture, job.progress.step) == (picture, step))  # noqa: B023
            assert job.progress.total == total
            if job.progress.previewed > before:
                found.append((picture, step))
        gated.let()
        until(lambda: len(job.pictures) > picture)  # noqa: B023
    assert found == [(picture, step) for picture in range(2) for step in steps]


def test_who_watches_sees_the_end_and_all_of_it(jobs: Jobs, gated: Gated) -> None:
    """Changes come from the drawing thread; the last one finds a job that is complete."""
    gated.let(10_000)

    async def watch(job: Job) -> tuple[int, str, bool]:
        seen = 0
        async for _ in job.changes():
            seen += 1
            if job.over:
                complete = bool(job.pictures) if job.status == "done" else job.error is not None
        return seen, job.status, complete

    async def many() -> list[tuple[int, str, bool]]:
        def fail(_: Image.Image) -> Image.Image:
            raise InputError("no")

        added = [
            jobs.add(gated_job(gated, "a", client=str(i), **({"finish": fail} if i % 2 else {})))
            for i in range(20)
        ]
        found = await asyncio.gather(*(watch(job) for job in added for _ in range(2)))
        assert not any(job._watchers for job in added)
        return found

    found = asyncio.run(many())
    assert all(seen >= 1 and complete for seen, _, complete in found)
    assert [status for _, status, _ in found] == ["done", "done", "failed", "failed"] * 10


def test_many_threads_ask_at_once(jobs: Jobs, gated: Gated) -> None:
    """Adding, asking and cancelling from eight threads leaves nothing behind and loses nothing."""
    gated.let(10_000)
    faults: list[Exception] = []
    added: list[Job] = []

    def ask(number: int) -> None:
        try:
            for i in range(30):
                job = gated_job(gated, "a", client=f"{number}", live=i % 3 == 0)
                try:
                    jobs.add(job)
                except Busy:
                    continue
                added.append(job)
                jobs.position(job), jobs.get(job.id), jobs.waiting
                if i % 4 == 0:
                    jobs.cancel(job)
        except Exception as error:
            faults.append(error)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    until(lambda: all(job.over for job in added))
    assert not faults and jobs.waiting == 0 and jobs.running is None
    assert all(job.status in ("done", "cancelled") for job in added)
