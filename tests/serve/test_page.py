"""Journeys over the page, in a browser: typing, drawing, stopping, history, problems, and what all of it looks like.

The models are tiny: what they draw does not matter here. One journey has the package's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from stable_diffusion import DiffusionModel
from tests.serve.browsing import Desk, chromium, desk
from tests.serve.served import Gated, Running, serving, until
from tests.tiny import TINY, tiny_model

pytestmark = pytest.mark.browser
WIDTHS = (360, 1280)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as steered:
        yield steered


@pytest.fixture
def gated() -> Iterator[tuple[Running, Gated]]:
    """A server whose model takes a step when it is let."""
    model = Gated(tiny_model())
    with serving({"tiny": model}) as running:
        yield running, model
        model.let(1000)


class Flights:
    """The requests for live pictures: how many there were, and how many at most at the same time."""

    def __init__(self, page: Any) -> None:
        self.count = self.now = self.most = 0
        page.on("request", lambda request: self._add(request, 1))
        page.on("requestfinished", lambda request: self._add(request, -1))
        page.on("requestfailed", lambda request: self._add(request, -1))

    def _add(self, request: Any, change: int) -> None:
        if request.url.endswith("/api/live"):
            self.count += change == 1
            self.now += change
            self.most = max(self.most, self.now)


@pytest.mark.parametrize("width", WIDTHS)
def test_typing_draws(browser: Any, width: int) -> None:
    """No click is needed, one request is in flight at most, and the last picture is of the text that stands there."""
    with (
        serving({"icons-128": DiffusionModel.from_pretrained()}) as running,
        desk(browser, running, width) as page,
    ):
        flights = Flights(page.page)
        page["#steps"].evaluate("(input) => { input.value = 2; input.dispatchEvent(new Event('input')); }")
        page["#prompt"].press_sequentially("a red apple", delay=25)
        page["#sheet img[alt='a red apple']"].wait_for()
        page["#styles [aria-label='twemoji style']"].click()
        page["#sheet img[alt='a red apple, twemoji style']"].wait_for()
        assert page["#prompt"].input_value() == "a red apple, twemoji style"
        assert flights.count >= 2 and flights.most == 1


def test_nothing_is_drawn_while_a_letter_is_composed(browser: Any, tiny: Running) -> None:
    with desk(browser, tiny) as page:
        flights = Flights(page.page)
        keyboard = page.context.new_cdp_session(page.page)
        page["#prompt"].focus()
        for text in ("k", "ki", "きつ", "きつね"):
            place = {"selectionStart": len(text), "selectionEnd": len(text)}
            keyboard.send("Input.imeSetComposition", {"text": text, **place})
            page.page.wait_for_timeout(160)
        assert flights.count == 0
        keyboard.send("Input.insertText", {"text": "狐"})
        page["#sheet img[alt='狐']"].wait_for()
        assert flights.count == 1


def test_a_picture_stays_until_the_next_one_comes(browser: Any, gated: tuple[Running, Gated]) -> None:
    """Progress and previews advance meanwhile, and it is said once that a picture came, not at each step."""
    running, model = gated
    with desk(browser, running) as page:
        model.let(TINY.num_inference_steps + 1)
        page["#prompt"].fill("a circle")
        page["#sheet img[alt='a circle']"].wait_for()
        page.rest()
        page.page.evaluate(
            """(() => {
                const status = document.getElementById("status");
                window.said = [];
                const observer = new MutationObserver(() => said.push(status.textContent));
                observer.observe(status, { childList: true, characterData: true, subtree: true });
            })()"""
        )
        page["#live"].uncheck()
        page["#prompt"].fill("a square")
        page.page.keyboard.press("Control+Enter")
        for step in range(1, TINY.num_inference_steps + 1):
            model.let()
            page[f"#progress[value='{step}']"].wait_for()
            assert page["#preview"].get_attribute("src").startswith("data:image/webp")
            assert page["#sheet img"].get_attribute("alt") == "a circle"
        model.let()
        page["#sheet img[alt='a square']"].wait_for()
        page["#kept [role=option]"].wait_for()
        page.rest()
        (said,) = [text for text in page.page.evaluate("said") if text]
        assert said.startswith("Saved")


def test_escape_stops(browser: Any, gated: tuple[Running, Gated]) -> None:
    running, model = gated
    with desk(browser, running) as page:
        page["#prompt"].fill("a circle")
        until(lambda: running.jobs.running is not None)
        page["#draw"].click()
        until(lambda: running.jobs.waiting == 1)
        page["#prompt"].focus()
        page.page.keyboard.press("Escape")
        page["#status:text('Stopped.')"].wait_for()
        until(lambda: not running.jobs.waiting)
        model.let()
        until(lambda: running.jobs.running is None)
        page.rest()
        assert page["#sheet img"].count() == 0
        assert page["#status"].text_content() == "Stopped."
        model.let(100)
        page["#prompt"].fill("a square")
        page["#sheet img[alt='a square']"].wait_for()


def test_a_reload_and_a_dropped_tab_lose_nothing(browser: Any, gated: tuple[Running, Gated]) -> None:
    running, model = gated
    with desk(browser, running) as page:
        model.let(100)
        page["#prompt"].fill("a circle")
        page["summary"].click()
        page["#steps"].fill("3")
        page["#guidance"].fill("1.5")
        page["[data-field=negative_prompt]"].fill("a square")
        page["#seed"].fill("9223372036854775807")
        page["#lock"].click()
        page["#sampler"].select_option("ddim")
        page["#count"].select_option("2")
        page.draw(2)
        fields = page.run("m.state.desk.fields")
        until(lambda: running.jobs.running is None)
        while model.steps.acquire(blocking=False):
            pass
        page["#live"].uncheck()
        page["#draw"].click()
        page["#running li"].nth(1).wait_for()
        page.page.close()
        model.let(100)
        until(lambda: running.jobs.running is None and not running.jobs.waiting)
        again = Desk(page.context, running.url)
        again.until(lambda: again["#kept [role=option]"].count() == 4)
        assert again.run("m.state.desk.fields") == fields
        assert again["#seed"].input_value() == "9223372036854775807"
        assert again["#prompt"].input_value() == "a circle"
        assert again["#lock"].get_attribute("aria-pressed") == "true"
        assert not again["#live"].is_checked() and again["#count"].input_value() == "2"
        settings = again.run(
            "(await m.store.keptPictures()).map((each) => [each.seed, each.settings.sampler])"
        )
        assert sorted(settings) == [["0", "ddim"], ["0", "ddim"], *[["9223372036854775807", "ddim"]] * 2]
        again.check()


def test_several_at_once_of_which_one_is_stopped(browser: Any, gated: tuple[Running, Gated]) -> None:
    """Seeds follow one another; drawing again takes new ones, unless the seed is locked."""
    running, model = gated
    with desk(browser, running) as page:
        page["#live"].uncheck()
        page["#prompt"].fill("a circle")
        page["#seed"].fill("7")
        page["#count"].select_option("3")
        page["#draw"].click()
        until(lambda: running.jobs.waiting == 2)
        page["#running li"].nth(1).get_by_role("button", name="Stop: a circle").click()
        until(lambda: running.jobs.waiting == 1)
        model.let(100)
        page.until(lambda: page["#kept [role=option]"].count() == 2)
        assert sorted(page.run("(await m.store.keptPictures()).map(({ seed }) => seed)")) == ["7", "9"]
        page["#count"].select_option("1")
        page["#lock"].click()
        page.draw()
        assert page["#seed"].input_value() == "7"
        page["#lock"].click()
        page.draw()
        assert page["#seed"].input_value() != "7"
        seed = page["#seed"].input_value()
        page["#dice"].click()
        assert page["#seed"].input_value() != seed


@pytest.mark.parametrize("width", WIDTHS)
def test_history(browser: Any, tiny: Running, width: int) -> None:
    """Pictures are opened, compared, downloaded, deleted and brought back, and others begin from them or vary them."""
    with desk(browser, tiny, width) as page:
        page["#live"].uncheck()
        files = []
        for prompt in ("a circle", "a square"):
            page["#prompt"].fill(prompt)
            files += page.draw()
        options = page["#kept [role=option]"]
        options.nth(1).click()
        page["#sheet img[alt='a circle']"].wait_for()
        assert page["#caption"].text_content() == "a circle"
        assert options.nth(1).get_attribute("aria-selected") == "true"
        with page.page.expect_download() as download:
            page["[data-act=download]"].click()
        assert download.value.path().read_bytes() == files[0]
        assert download.value.suggested_filename.startswith("a-circle-")

        page["[data-act=compare]"].click()
        options.nth(0).click()
        page["#compare img[alt='a circle']"].wait_for()
        page["#compare img[alt='a square']"].wait_for()
        page.page.keyboard.press("End")
        assert page["#cut"].input_value() == "100"
        page.page.keyboard.press("Escape")

        page["#sheet img[alt='a circle']"].wait_for()
        page["[data-act=delete]"].click()
        page.until(lambda: options.count() == 1)
        page["#action:text('Undo')"].click()
        page.until(lambda: options.count() == 2)

        page["#prompt"].fill("a star")
        options.nth(1).click()
        page["[data-act=settings]"].click()
        assert page["#prompt"].input_value() == "a circle"
        page["[data-act=begin]"].click()
        page["#startImage"].wait_for()
        assert page.file("m.state.desk.image") == files[0]
        page["#remove"].click()
        page["[data-act=vary]"].click()
        page.until(lambda: options.count() == 6)
        page.rest()
        kept = page.run("(await m.store.keptPictures()).map(({ settings }) => settings)")
        assert len({settings.get("variation_seed") for settings in kept[:4]}) == 4
        assert {settings["seed"] for settings in kept[:4]} == {kept[5]["seed"]}
        page.open()
        page.until(lambda: options.count() == 6)


def test_problems_are_sentences_and_pass(browser: Any, tiny: Running) -> None:
    """The server is away, has too much to do, or says no: the page says so, and goes on by itself."""
    with desk(browser, tiny) as page:
        page.expected = ("ERR_FAILED", "429", "400")
        down = lambda route: route.abort()  # noqa: E731
        page.page.route("**/api/**", down)
        page.page.route("**/health", down)
        page["#prompt"].fill("a circle")
        page["#line.error #status:text('does not answer')"].wait_for()
        page.page.unroute("**/api/**")
        page.page.unroute("**/health")
        page["#sheet img[alt='a circle']"].wait_for()
        page["#line:not(.error)"].wait_for()

        said = {"error": {"message": "64 jobs are waiting", "field": None}}
        busy = lambda route: route.fulfill(status=429, headers={"Retry-After": "1"}, json=said)  # noqa: E731
        page.page.route("**/api/live", busy, times=1)
        page["#prompt"].fill("a square")
        page["#line.error #status:text('64 jobs are waiting.')"].wait_for()
        page["#sheet img[alt='a square']"].wait_for()

        page["summary"].click()
        page["#steps"].fill("999")
        page["#line.error #status:text('at most 150')"].wait_for()
        page["#steps"].fill("2")
        page["#line:not(.error) #status:text('2 steps')"].wait_for()


def test_words_of_prompts_are_never_markup(browser: Any, tiny: Running) -> None:
    """Not in the status line, not in the history, not in names."""
    prompt = "<img src=x onerror=document.title='taken'>"
    with desk(browser, tiny) as page:
        page["#prompt"].fill(prompt)
        page["#sheet img"].wait_for()
        page.draw()
        page["#kept [role=option]"].click()
        assert page["#caption"].text_content() == prompt
        assert page["#sheet img"].get_attribute("alt") == prompt
        assert page.page.title() == "minisd" and page["img[src=x]"].count() == 0
