"""What the page does with runs that are there: change, train on, merge, run again."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from browsing import DEMO, PATIENCE, Studio, choose, opened, pick, state, tools, until
from playwright.sync_api import Page, expect

from unziplora.images.files import open_upright
from unziplora.jobs.queue import Queue
from unziplora.studio import actions
from unziplora.utils.inputs import read_toml


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Iterator[Studio]:
    """A studio with a finished run that the test may change."""
    shutil.copytree(trained, tmp_path / "runs" / "rocket")
    studio = Studio(tmp_path / "runs").start()
    yield studio
    studio.stop()


def test_waiting_run_is_changed(tmp_path: Path, page: Page) -> None:
    studio = Studio(tmp_path / "runs")
    words = {"content": "rocket", "style": "linocut", "base": "bundled", "steps": 500}
    job = actions.start(studio.runs, "split", words, "rocket", [open_upright(DEMO, 128)[0]])
    try:
        opened(page, studio.start(), "Runs")
        pick(page, "job", f"{job.number}: rocket")
        page.locator("#change").click()
        tools(page)
        expect(page.locator("#start")).to_have_text("Save the changes of “rocket”")
        choose(page, "style", "pencil sketch")
        page.locator("#start").click()
        until(lambda: read_toml(job.run.config_file)["style"] == "pencil sketch", "the change was not saved")
        expect(page.locator("#start")).to_have_text("Start")
        assert [one.number for one in Queue(studio.runs).jobs()] == [job.number]
    finally:
        studio.stop()


def test_finished_run_is_trained_on(copied: Studio, page: Page) -> None:
    opened(page, copied, "Runs")
    page.get_by_role("button", name="Train on, rename, other file formats").click()
    page.get_by_label("More steps for a finished run").fill("1")
    page.locator("#extend").click()
    expect(page.locator("#chosen-live")).to_contain_text("3 / 3", timeout=2 * PATIENCE)
    expect(state(page, "chosen")).to_have_text("finished", timeout=2 * PATIENCE)


def test_two_loras_become_one(copied: Studio, page: Page) -> None:
    opened(page, copied, "Merge and train")
    for kind in ("content", "style"):
        pick(page, f"zip-{kind}_lora", "rocket")
    page.locator("#zip-name textarea, #zip-name input").fill("both")
    page.get_by_role("button", name="Settings", exact=False).first.click()
    for group in page.get_by_role("button", name="Method").all():
        group.click()
    choose(page, "zip-method", "direct")
    page.locator("#zip-start").click()
    expect(state(page, "chosen")).to_have_text("finished", timeout=2 * PATIENCE)
    expect(page.get_by_role("link", name="LoRA (kohya)")).to_be_visible(timeout=PATIENCE)
    assert list((copied.runs / "both").glob("*.safetensors"))


def test_run_is_run_again(copied: Studio, page: Page) -> None:
    opened(page, copied, "Runs")
    page.get_by_role("button", name="Run it again").click()
    expect(page.locator("#chosen-run input")).to_have_value("rocket-2", timeout=2 * PATIENCE)  # a worker starts first
    expect(state(page, "chosen")).to_have_text("finished", timeout=3 * PATIENCE)
