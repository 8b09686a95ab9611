"""The page for everybody: by keyboard, in a narrow window, in light and dark, with a screen reader."""

import pytest
from axe_playwright_python.sync_playwright import Axe
from browsing import DEMO, PATIENCE, Studio, choosing, opened, state, to_tab, tools
from playwright.sync_api import Browser, Page, expect

TABS = ("Split", "Runs", "Play", "Merge and train", "Files")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_tab_has_a_serious_violation(filled: Studio, browser: Browser, scheme) -> None:
    with browser.new_context(viewport={"width": 1280, "height": 900}, color_scheme=scheme) as context:
        page = opened(context.new_page(), filled)
        expect(state(page)).to_be_visible(timeout=PATIENCE)
        faults = {}
        for tab in TABS:
            to_tab(page, tab)
            page.wait_for_timeout(500)
            found = Axe().run(page).response["violations"]
            faults[tab] = [
                (one["id"], node["target"], node["html"][:200], node.get("failureSummary", "")[:300])
                for one in found
                for node in one["nodes"]
                if one["impact"] in ("serious", "critical")
            ]
        assert faults == {tab: [] for tab in TABS}


@pytest.mark.parametrize("width", [390, 1280])
def test_no_tab_scrolls_sideways(filled: Studio, browser: Browser, width: int) -> None:
    with browser.new_context(viewport={"width": width, "height": 844}) as context:
        page = opened(context.new_page(), filled)
        expect(state(page)).to_be_visible(timeout=PATIENCE)
        for tab in TABS:
            to_tab(page, tab)
            page.wait_for_timeout(300)
            assert page.evaluate("document.documentElement.scrollWidth") <= width, tab


def test_split_is_started_by_the_keyboard_alone(studio: Studio, page: Page) -> None:
    choosing(page, DEMO)
    opened(page, studio)
    focus(page, "Drop an image file here to upload")
    page.keyboard.press("Enter")
    tools(page)
    for label, word in (("2 · What is in it?", "rocket"), ("3 · How is it made?", "linocut")):
        focus(page, label)
        page.keyboard.type(word)
        page.keyboard.press("Enter")
    focus(page, "Start")
    page.keyboard.press("Space")
    expect(state(page)).to_have_text("running", timeout=PATIENCE)


def focus(page: Page, name: str) -> None:
    """Press Tab until an element of a name has the focus."""
    script = "() => { const e = document.activeElement; return e.getAttribute('aria-label') || e.innerText || '' }"
    for _ in range(60):
        if page.evaluate(script).strip() == name:
            return
        page.keyboard.press("Tab")
    raise AssertionError(f"{name} is not reached by Tab")
