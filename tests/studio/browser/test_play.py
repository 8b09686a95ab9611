"""Pictures that are made in the page, and bring their settings back."""

import json
from pathlib import Path
from typing import Any

from browsing import PATIENCE, Studio, drop, opened, pick, until
from PIL import Image
from playwright.sync_api import BrowserContext, Page, expect

SET = {"content-strength": "0.5", "style-strength": "0.8", "play-steps": "2", "seed": "7"}


def number(page: Page, name: str) -> Any:
    return page.locator(f"#{name} input[type=number]")


def recipe(file: Path) -> dict[str, Any]:
    with Image.open(file) as image:
        return json.loads(image.info["unziplora"])


def test_dials_make_a_picture_that_brings_them_back(filled: Studio, context: BrowserContext, tmp_path: Path) -> None:
    page = opened(context.new_page(), filled, "Play")
    for name in ("play-content", "play-style"):
        pick(page, name, "rocket")
    for name, value in SET.items():
        number(page, name).fill(value)
        number(page, name).press("Tab")
    page.locator("#prompt textarea").fill("a sks rocket in the sky")
    page.locator("#make").click()
    expect(page.locator("#pictures img").first).to_be_visible(timeout=PATIENCE)
    file = saved(page, tmp_path)
    made = recipe(file)
    assert (made["seed"], made["steps"], made["content_strength"], made["style_strength"]) == (7, 2, 0.5, 0.8)

    fresh = opened(context.new_page(), filled, "Play")
    drop(fresh, file, "#dropped")
    expect(fresh.locator("#prompt textarea")).to_have_value("a sks rocket in the sky", timeout=PATIENCE)
    for name in ("play-content", "play-style"):
        expect(fresh.locator(f"#{name} input")).to_have_value("rocket")
    for name, value in SET.items():
        expect(number(fresh, name)).to_have_value(value)


def saved(page: Page, folder: Path) -> Path:
    """Save the newest picture from the gallery."""
    page.locator("#pictures button.thumbnail-item").first.click()
    with page.expect_download() as download:
        page.locator("#pictures").get_by_label("Download").click()
    file = folder / "made.png"
    download.value.save_as(file)
    return file


def test_grid_has_a_picture_for_each_pair_of_strengths(filled: Studio, page: Page) -> None:
    opened(page, filled, "Play")
    for name in ("play-content", "play-style"):
        pick(page, name, "rocket")
    number(page, "play-steps").fill("1")
    number(page, "play-steps").press("Tab")
    page.get_by_role("button", name="Grid of both dials").click()
    page.locator("#down textarea, #down input").fill("0; 1")
    page.locator("#across textarea, #across input").fill("0.5; 1; 2")
    page.locator("#draw").click()
    expect(page.locator("#grid img")).to_be_visible(timeout=PATIENCE)
    file = until(lambda: next((filled.runs / "pictures").glob("grid*.png"), None), "no grid was written")
    width, height = Image.open(file).size
    assert width > height
