"""The page for everybody: on phones, in light and dark, by keys alone, and as axe-core judges it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serve.browsing import Desk, chromium, desk
from tests.serve.served import Running
from tests.serve.test_page_pictures import png

pytestmark = pytest.mark.browser

TOUCHED = "a[href], button, input, select, textarea, summary, canvas[tabindex], [role=option]"
NAME = "each.id || each.dataset.act || each.dataset.word || each.dataset.field || each.textContent.trim()"
"""What tests call an element."""
SMALL = f"""
[...document.querySelectorAll({TOUCHED!r})]
    .filter((each) => each.checkVisibility({{ visibilityProperty: true }}) && !each.matches('.skip'))
    .map((each) => [each.id || each.textContent || each.outerHTML, each.getBoundingClientRect()])
    .filter(([, {{ width, height }}]) => Math.min(width, height) < 43.9)
    .map(([name, {{ width, height }}]) => `${{name}}: ${{width}} x ${{height}}`)
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as steered:
        yield steered


def states(page: Desk) -> Iterator[str]:
    """Brings the page into all that it can look like, one after the other."""
    yield "empty"
    page["#prompt"].fill("a circle")
    page["#sheet img[alt='a circle']"].wait_for()
    page.rest()
    yield "drawn"
    page["#count"].select_option("2")
    page.draw(2)
    yield "several"
    page["#kept [role=option]"].nth(1).click()
    page["#caption"].wait_for()
    page["summary"].click()
    page["#sampler"].select_option("ddim")
    page.rest()
    yield "settings"
    page["#kept [role=option]"].nth(1).click()
    page["[data-act=compare]"].click()
    page["#kept [role=option]"].nth(0).click()
    page["#cut"].wait_for()
    yield "compared"
    page.bring("drop", png())
    page["#paint"].click()
    page["#masking"].wait_for()
    page["#layer"].press("Space")
    yield "mask"
    page["#painted"].click()
    page.expected = ("400",)
    page["#steps"].fill("999")
    page["#line.error"].wait_for()
    yield "error"


@pytest.mark.parametrize(("width", "theme"), [(360, "light"), (360, "dark"), (1280, "light"), (1280, "dark")])
def test_everybody_can_use_it(browser: Any, tiny: Running, width: int, theme: str) -> None:
    """No violation of axe-core's rules, no target under 44 pixels, nothing beside the screen."""
    axe = importlib.util.find_spec("axe_playwright_python")
    if axe is None or axe.origin is None:
        pytest.skip("needs axe-playwright-python")
    script = (Path(axe.origin).parent / "axe.min.js").read_text(encoding="utf-8")
    with desk(browser, tiny, width, color_scheme=theme, reduced_motion="reduce") as page:
        page.page.evaluate(script)
        for state in states(page):
            found = page.page.evaluate("axe.run({ resultTypes: ['violations'] })")["violations"]
            assert not found, (
                state,
                [(each["id"], [node["html"] for node in each["nodes"]]) for each in found],
            )
            assert page.page.evaluate(SMALL) == [], state
            assert page.page.evaluate("document.documentElement.scrollWidth <= innerWidth"), state
            assert page.page.evaluate("document.getAnimations().length") == 0, state
        page.page.evaluate("document.body.append(Object.assign(document.createElement('a'), { href: '#' }))")
        found = page.page.evaluate("axe.run({ runOnly: ['link-name'] })")["violations"]
        assert found and page.page.evaluate(SMALL), "both would be noticed"


def test_light_and_dark(browser: Any, tiny: Running) -> None:
    """As the system has it, or as the person chooses, also after a reload and before the first script has run."""
    script = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).every((part) => part > 128)"
    with desk(browser, tiny, color_scheme="dark") as page:
        assert not page.page.evaluate(script)
        page["#theme"].click()
        page["#themeName:text('light')"].wait_for()
        assert page.page.evaluate(script)
        page.open()
        assert page.page.evaluate(script)
        page.page.emulate_media(color_scheme="light")
        page["#theme"].click()
        assert not page.page.evaluate(script)
        page["#theme"].click()
        assert page.page.evaluate(script)


def focused(page: Desk) -> tuple[str, bool]:
    """What has the focus, and whether one sees that."""
    name, seen = page.page.evaluate(
        """(() => {
            const each = document.activeElement;
            const shown = each.matches("#live") ? each.nextElementSibling : each;
            const { outlineStyle, outlineWidth } = getComputedStyle(shown);
            return [NAME, outlineStyle !== "none" && parseFloat(outlineWidth) >= 2];
        })()""".replace("NAME", NAME)
    )
    return name, seen


def test_keys_reach_all_and_one_sees_where(browser: Any, tiny: Running) -> None:
    with desk(browser, tiny, 1280) as page:
        page["#prompt"].fill("a circle")
        page.draw()
        page["#prompt"].fill("a square")
        page.draw()
        page["summary"].click()
        page[".skip"].focus()
        page.page.keyboard.press("Tab")  # so that the browser knows of keys
        page.page.keyboard.press("Shift+Tab")
        reached = []
        while not page.page.evaluate("document.activeElement === document.body") and len(reached) < 80:
            name, seen = focused(page)
            assert seen, name
            reached.append(name)
            page.page.keyboard.press("Tab")
        expected = page.page.evaluate(
            f"""[...document.querySelectorAll({TOUCHED!r})]
                .filter((each) => each.checkVisibility() && each.tabIndex >= 0 && !each.disabled)
                .map((each) => {NAME})
            """
        )
        assert reached == expected and {"prompt", "draw", "seed", "live", "choose", "steps"} <= set(reached)

        keyboard = page.page.keyboard
        page["#kept [role=option][tabindex='0']"].focus()
        keyboard.press("ArrowRight")
        keyboard.press("Enter")
        page["#sheet img[alt='a circle']"].wait_for()
        keyboard.press("Home")
        keyboard.press("Space")
        page["#sheet img[alt='a square']"].wait_for()
        keyboard.press("Delete")
        page.until(lambda: page["#kept [role=option]"].count() == 1)
        assert page.page.evaluate("document.activeElement.getAttribute('role')") == "option"


def test_screen_readers_hear_what_is_there(browser: Any, tiny: Running) -> None:
    """Names and roles of what one meets, in its order."""
    with desk(browser, tiny) as page:
        page["#prompt"].fill("a circle")
        page.draw()
        tree = page["body"].aria_snapshot()
    for line in (
        'heading "minisd" [level=1]',
        'textbox "Prompt"',
        'switch "Live" [checked]',
        'button "Generate',
        'combobox "Number of pictures"',
        'button "Lock the seed"',
        'img "a circle"',
        "status: Saved",
        'group "Actions for this picture"',
        'listbox "History"',
        'option "a circle" [selected]',
    ):
        assert line in tree, (line, tree)
    order = ('"Prompt"', 'button "Generate', "status:", "Image to image", "listbox")
    positions = [tree.index(word) for word in order]
    assert positions == sorted(positions)
