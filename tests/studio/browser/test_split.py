"""The way from a picture to two LoRAs in another program, through the page."""

from pathlib import Path

from browsing import (
    DEMO,
    PATIENCE,
    Studio,
    advanced,
    choose,
    crop,
    drop,
    loras_in_diffusers,
    message,
    opened,
    paint,
    state,
    to_tab,
    tools,
    words,
)
from PIL import Image
from playwright.sync_api import BrowserContext, Page, expect

from unziplora.config.split import SplitConfig
from unziplora.jobs.queue import Queue
from unziplora.utils.inputs import read_toml


def test_picture_becomes_two_loras_that_diffusers_loads(
    studio: Studio, context: BrowserContext, tmp_path: Path
) -> None:
    page = opened(context.new_page(), studio)
    drop(page, DEMO)
    tools(page)
    crop(page)
    paint(page)
    words(page)
    expect(page.locator("#forecast")).to_contain_text("a sks rocket in linocut style", timeout=PATIENCE)
    advanced(page, steps=200)
    page.locator("#start").click()
    worker = studio.halted()
    expect(state(page)).to_have_text("running", timeout=PATIENCE)
    has_picture_and_mask(studio.runs / "rocket")

    page.reload()
    expect(state(page)).to_have_text("running", timeout=PATIENCE)
    second = opened(context.new_page(), studio)
    expect(state(second)).to_have_text("running", timeout=PATIENCE)
    expect(second.locator("#now-live")).to_contain_text("/ 200", timeout=PATIENCE)
    page.locator("#now-cancel").click()
    expect(state(page)).to_have_text("canceling", timeout=PATIENCE)
    worker.resume()
    for view in (page, second):
        expect(state(view)).to_have_text("interrupted", timeout=PATIENCE)
    second.locator("#now-continue").click()
    for view in (page, second):
        expect(state(view)).to_have_text("finished", timeout=3 * PATIENCE)
        expect(view.locator("#now-live")).to_contain_text("200 / 200")
    assert loras_in_diffusers(downloaded(page, tmp_path)) == {"content", "style"}


def has_picture_and_mask(run: Path) -> None:
    """Check that a run learns what was left of the picture, where it was painted on."""
    settings = read_toml(run / "config.toml")
    picture, mask = (Image.open(settings[name][0]) for name in ("images", "masks"))
    whole = Image.open(DEMO)
    assert picture.size == mask.size
    assert picture.width < whole.width
    assert picture.height == whole.height
    assert 0 < mask.convert("L").histogram()[255] < mask.width * mask.height


def downloaded(page: Page, folder: Path) -> list[Path]:
    """Download both LoRAs of the chosen run."""
    to_tab(page, "Runs")
    files = []
    for name in ("content", "style"):
        with page.expect_download() as download:
            page.get_by_role("link", name=f"{name} LoRA (kohya)").click()
        files.append(folder / download.value.suggested_filename)
        download.value.save_as(files[-1])
    return files


def test_picture_that_is_dropped_at_once_is_not_lost(filled: Studio, page: Page) -> None:
    page.goto(filled.address)
    page.locator("#drop button").first.wait_for()
    drop(page, DEMO)
    tools(page)
    page.get_by_role("button", name="Another picture").click()
    expect(page.locator("#picture")).to_have_count(0)
    drop(page, DEMO)
    tools(page)


def test_picture_is_not_sent_again_when_a_run_changes(studio: Studio, page: Page) -> None:
    opened(page, studio)
    drop(page, DEMO)
    tools(page)
    words(page)
    expect(page.locator("#forecast")).to_contain_text("a sks rocket in linocut style", timeout=PATIENCE)
    queue = Queue(studio.runs)
    job = queue.submit(SplitConfig(images=[DEMO], content="cat", style="ink", base="bundled", out=studio.runs / "cat"))
    expect(state(page)).to_have_text("queued", timeout=PATIENCE)
    sent: list[str] = []
    page.on("request", lambda request: sent.append(request.url) if "upload" in request.url else None)
    queue.pause(job.number)
    expect(state(page)).to_have_text("paused", timeout=PATIENCE)
    assert sent == []


def test_form_of_a_run_comes_back_with_its_picture(filled: Studio, page: Page) -> None:
    opened(page, filled, "Runs")
    page.locator("#reuse").click()
    tools(page)
    expect(page.locator("#content input")).to_have_value("rocket")
    expect(page.locator("#style input")).to_have_value("linocut")
    expect(page.locator("#forecast")).to_contain_text("a sks rocket in linocut style", timeout=PATIENCE)


def test_missing_words_are_named(filled: Studio, page: Page) -> None:
    opened(page, filled)
    page.locator("#start").click()
    expect(message(page)).to_contain_text("there is no picture yet", timeout=PATIENCE)
    drop(page, DEMO)
    tools(page)
    expect(page.locator("#forecast")).to_contain_text("Name what is in it and how it is made", timeout=PATIENCE)
    choose(page, "content", "rocket")
    expect(page.locator("#forecast")).to_contain_text("Name how it is made", timeout=PATIENCE)
