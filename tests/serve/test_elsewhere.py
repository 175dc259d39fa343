"""A page of another site, in a real browser: it starts nothing, ends nothing, reads nothing and shows nothing."""

from __future__ import annotations

import contextlib
import http.server
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image

from tests.serve.browsing import chromium
from tests.serve.served import PATIENCE, Running, data_uri, serving
from tests.tiny import tiny_model

pytestmark = pytest.mark.browser

TRIES = """
async ([url, id]) => {
    const body = JSON.stringify({ prompt: "a", num_inference_steps: 1 });
    const form = new FormData();
    form.append("prompt", "a");
    form.append("image", new Blob(["x"], { type: "image/png" }), "x.png");
    const simple = { method: "POST", mode: "no-cors" };
    const json = { method: "POST", headers: { "Content-Type": "application/json" }, body };
    const tries = {
        text: () => fetch(`${url}/api/jobs`, { ...simple, body }),
        blob: () => fetch(`${url}/api/live`, { ...simple, body: new Blob([body], { type: "text/plain" }) }),
        form: () => fetch(`${url}/v1/images/edits`, { ...simple, body: form }),
        interrupt: () => fetch(`${url}/sdapi/v1/interrupt`, simple),
        json: () => fetch(`${url}/api/jobs`, json),
        generations: () => fetch(`${url}/v1/images/generations`, json),
        end: () => fetch(`${url}/api/jobs/${id}`, { method: "DELETE" }),
        read: () => fetch(`${url}/api/models`),
        look: () => new Promise((resolve, reject) => {
            const image = new Image();
            image.onload = () => resolve({ type: "shown" });
            image.onerror = () => reject(new Error("not shown"));
            image.src = `${url}/api/jobs/${id}/pictures/0`;
        }),
    };
    navigator.sendBeacon(`${url}/api/jobs`, body);
    const said = {};
    for (const [name, attempt] of Object.entries(tries)) {
        said[name] = await attempt().then((answer) => answer.status || answer.type, () => "failed");
    }
    const frame = document.createElement("iframe");
    frame.src = url;
    const loaded = new Promise((resolve) => { frame.onload = resolve; });
    document.body.append(frame);
    await loaded;
    return said;
}
"""


class Quiet(http.server.BaseHTTPRequestHandler):
    """A web site of one empty page."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<!doctype html><title>elsewhere</title>")

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@contextlib.contextmanager
def site() -> Iterator[int]:
    """The port of a web site."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def tried(browser: Any, running: Running, origin: str) -> tuple[dict[str, Any], str]:
    """What the page of an origin is told, and where its frame is."""
    image = data_uri(Image.effect_noise((32, 32), 60))
    id = running.job(prompt="a", image=image, num_inference_steps=1)
    running.over(id)
    page = browser.new_page()
    page.set_default_timeout(PATIENCE * 1000)
    try:
        page.goto(origin)
        said = page.evaluate(TRIES, [running.url, id])
        end = time.monotonic() + PATIENCE
        while not page.frames[1].url and time.monotonic() < end:  # it may still be on its way
            page.wait_for_timeout(50)
        return said, page.frames[1].url
    finally:
        page.close()


def test_a_page_from_elsewhere_can_do_nothing() -> None:
    """Of the same machine or not; a page that the server was told of may ask, which shows that the tries could work."""
    with chromium() as browser, site() as port, serving({"tiny": tiny_model()}) as running:
        for origin in (f"http://127.0.0.1:{port}", f"http://localhost:{port}"):
            before = set(running.jobs._known)
            said, frame = tried(browser, running, origin)
            assert len(said) == 9 and set(said.values()) == {"failed"}
            assert frame.startswith("chrome-error://")
            assert len(set(running.jobs._known) - before) == 1, "the one of the test"
        with serving({"tiny": tiny_model()}, origins=frozenset({origin})) as friendly:
            said, frame = tried(browser, friendly, origin)
            assert (said["json"], said["generations"], said["end"], said["read"]) == (202, 200, 204, 200)
            assert frame.startswith("chrome-error://")
