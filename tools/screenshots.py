"""Takes the pictures of the page in docs/: it starts ``minisd serve``, and draws and paints as a person would.

    python tools/screenshots.py docs

It writes page-light.png, page-dark.png and page-phone.png. Needs playwright, and Chromium, whose program the
environment variable CHROMIUM can name. The type is the system's own.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

PATIENCE = 300_000
"""Milliseconds for a picture."""
KEPT = (
    ("a 3d render of a castle", 2),
    ("a black line drawing of a bicycle", 3),
    ("an owl, fluent flat style", 1),
    ("a sailboat, emojione style", 1),
    ("a cactus, blob style", 1),
    ("a black and white pictogram of a guitar", 1),
    ("a smooth shaded cartoon of a strawberry", 1),
    ("a fox, noto style", 7),
)
"""Prompts and seeds; the last one is on the stage."""
MASKED = "a cat, noto style"
"""What shall be drawn where the mask is painted."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where the three pictures go")
    parser.add_argument("--quick", action="store_true", help="few pictures, of one step")
    options = parser.parse_args(arguments)
    from playwright.sync_api import sync_playwright

    program = chromium()
    if program is None:
        parser.error(
            "Chromium is not here: install it, or name its program in the environment variable CHROMIUM"
        )
    kept, steps = (KEPT[-2:], 1) if options.quick else (KEPT, None)
    with served() as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program)
        for name, size, theme, paints in (
            ("light", (1240, 884), "light", False),
            ("dark", (1240, 884), "dark", True),
            ("phone", (360, 780), "light", False),
        ):
            phone = size[0] < 500
            page = browser.new_page(
                viewport={"width": size[0], "height": size[1]},
                color_scheme="dark" if theme == "dark" else "light",
                device_scale_factor=2 if phone else 1,
                has_touch=phone,
            )
            page.set_default_timeout(PATIENCE)
            page.goto(address)
            page.wait_for_selector("html[data-ready]")
            for number, (prompt, seed) in enumerate(kept[-1:] if phone else kept):
                draw(page, prompt, seed, steps, number + 1)
            if paints:
                paint(page)
                page.wait_for_selector("#working", state="hidden")
            page.evaluate("document.activeElement.blur()")
            page.mouse.move(0, 0)
            page.wait_for_timeout(500)
            path = options.folder / f"page-{name}.png"
            with Image.open(io.BytesIO(page.screenshot())) as picture:
                picture.convert("RGB").save(path, optimize=True)
            print(path)
            page.close()
        browser.close()


def draw(page: Any, prompt: str, seed: int, steps: int | None, count: int) -> None:
    """Draws and keeps a picture; `count` are there then."""
    if steps is not None:
        page.evaluate(
            "(steps) => { const input = document.getElementById('steps'); input.value = steps;"
            " input.dispatchEvent(new Event('input')); }",
            steps,
        )
    page.fill("#seed", str(seed))
    page.fill("#prompt", prompt)
    page.keyboard.press("Control+Enter")
    page.wait_for_selector(f"#kept [role=option]:nth-child({count})")
    page.wait_for_selector("#working", state="hidden")


def paint(page: Any) -> None:
    """Begins from the picture on the stage, and paints a mask over its upper half."""
    page.click("[data-act=begin]")
    page.click("#paint")
    page.wait_for_selector("#masking")
    box = page.locator("#layer").bounding_box()
    for y in (0.08, 0.19, 0.3):
        page.mouse.move(box["x"] + 0.12 * box["width"], box["y"] + y * box["height"])
        page.mouse.down()
        page.mouse.move(box["x"] + 0.88 * box["width"], box["y"] + (y + 0.02) * box["height"], steps=12)
        page.mouse.up()
    page.fill("#prompt", MASKED)


@contextlib.contextmanager
def served() -> Iterator[str]:
    """The address of a server of the package's own model."""
    command = [sys.executable, "-m", "stable_diffusion", "serve", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().split()[-1]
        finally:
            process.terminate()


def chromium() -> str | None:
    """The browser's program, where it is here."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)


if __name__ == "__main__":
    main()
