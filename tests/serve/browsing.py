"""A browser in front of the page: what its tests share."""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.serve.served import PATIENCE, Running
from tools import screenshots


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """Chromium, steered by Playwright; the test is skipped where one of them is missing."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    path = screenshots.chromium()
    if path is None:
        pytest.skip("needs Chromium: install it, or name its program in CHROMIUM")
    with playwright.sync_playwright() as steered:
        playwright.expect.set_options(timeout=PATIENCE * 1000)
        browser = steered.chromium.launch(executable_path=path)
        yield browser
        browser.close()


class Desk:
    """The page in a tab, and all that it said and asked for."""

    def __init__(self, context: Any, url: str) -> None:
        self.context, self.url = context, url
        self.page = context.new_page()
        self.hosts: set[str] = set()
        self.wrong: list[str] = []
        self.expected: tuple[str, ...] = ()
        """Parts of console messages that a test provokes."""
        self.page.on("request", lambda request: self._asked(request.url))
        self.page.on("console", lambda message: self._said(message.type, message.text))
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.set_default_timeout(PATIENCE * 1000)
        self.open()

    def _asked(self, url: str) -> None:
        if not url.startswith(("blob:", "data:")):
            self.hosts.add(urlsplit(url).netloc)

    def _said(self, kind: str, text: str) -> None:
        if kind in ("error", "warning"):
            self.wrong.append(text)

    def open(self) -> None:
        self.page.goto(self.url)
        self.page.wait_for_selector("html[data-ready]")

    def __getitem__(self, selector: str) -> Any:
        return self.page.locator(selector)

    def run(self, script: str, *values: Any) -> Any:
        """What a script gives, which has the modules of the page as ``m``; its values are ``v``."""
        names = ("state", "store", "live", "draw", "stage", "restore")
        modules = ", ".join(f"{name}: await import('./{name}.js')" for name in names)
        return self.page.evaluate(
            f"async (v) => {{ const m = {{{modules}}}; return {script} }}", list(values)
        )

    def until(self, holds: Callable[[], object]) -> None:
        """Waits until something holds."""
        for _ in range(int(PATIENCE * 20)):
            if holds():
                return
            self.page.wait_for_timeout(50)
        pytest.fail("it never was")

    def file(self, expression: str) -> bytes:
        """The bytes of a Blob."""
        script = f"Array.from(new Uint8Array(await (await {expression}).arrayBuffer()))"
        return bytes(self.run(script))

    def draw(self, count: int = 1) -> list[bytes]:
        """Presses the button, and gives the files of the pictures that are kept, the oldest first."""
        before = self["#kept [role=option]"].count()
        self["#draw"].click()
        self.until(lambda: self["#kept [role=option]"].count() == before + count)
        self.rest()
        return [
            self.file(f"m.store.keptPictures().then((all) => all[{index}].blob)") for index in range(count)
        ][::-1]

    def rest(self) -> None:
        """Waits until nothing is in work and nothing is about to be."""
        self.page.wait_for_timeout(200)
        self.until(lambda: self["#working"].is_hidden())

    def bring(self, way: str, content: bytes, name: str = "picture.png", kind: str = "image/png") -> None:
        """Brings a file to the page: by "drop", "paste" or "choose"."""
        if way == "choose":
            self["#file"].set_input_files({"name": name, "mimeType": kind, "buffer": content})
            return
        self.page.evaluate(
            """([way, content, name, type]) => {
                const data = new DataTransfer();
                const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
                data.items.add(new File([bytes], name, { type }));
                const how = { bubbles: true, cancelable: true };
                const event = way === "drop"
                    ? new DragEvent("drop", { ...how, dataTransfer: data })
                    : new ClipboardEvent("paste", { ...how, clipboardData: data });
                document.body.dispatchEvent(event);
            }""",
            [way, base64.b64encode(content).decode(), name, kind],
        )

    def check(self) -> None:
        """Nothing went to another host, and the console has nothing but what was expected."""
        assert self.hosts <= {urlsplit(self.url).netloc}, self.hosts
        said = [text for text in self.wrong if not any(part in text for part in self.expected)]
        assert not said, said


@contextlib.contextmanager
def desk(
    browser: Any, running: Running, width: int = 1280, height: int = 800, **options: Any
) -> Iterator[Desk]:
    """The page in a browser that has never seen it; at the end, it has to have been quiet."""
    context = browser.new_context(viewport={"width": width, "height": height}, **options)
    try:
        opened = Desk(context, running.url)
        yield opened
        opened.check()
    finally:
        context.close()
