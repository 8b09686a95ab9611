"""The page when something dies: the server, the worker, the disk."""

import resource
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from browsing import DEMO, PATIENCE, Studio, opened, state
from playwright.sync_api import Page, expect

from unziplora.config.split import SplitConfig
from unziplora.jobs.queue import Queue

SMALL, UNLIMITED = 300_000, resource.RLIM_INFINITY


def submit(runs: Path, name: str = "rocket", steps: int = 150) -> None:
    """Append a run of short steps to the queue, for which nobody works yet."""
    Queue(runs).submit(
        SplitConfig(
            images=[DEMO], content="rocket", style="linocut", base="bundled", out=runs / name, steps=steps,
            phrase_steps=0, content_variants=False, batch_size=1, sample_seeds=[], rank=4,
        )
    )  # fmt: skip


@pytest.fixture
def waiting(tmp_path: Path) -> Iterator[Studio]:
    """A studio that is not started yet, with a job in its queue."""
    studio = Studio(tmp_path / "runs")
    submit(studio.runs)
    yield studio
    studio.stop()


def test_page_outlives_its_server_and_the_run_too(waiting: Studio, page: Page) -> None:
    opened(page, waiting.start())
    expect(page.locator("#now-live")).to_contain_text("Nobody works on the queue", timeout=PATIENCE)
    page.locator("#now-continue").click()
    worker = waiting.halted()
    expect(state(page)).to_have_text("running", timeout=PATIENCE)
    waiting.kill()
    expect(page.locator("#lost")).to_contain_text("does not answer", timeout=PATIENCE)
    assert worker.is_running()
    worker.resume()
    waiting.start()
    expect(page.locator("#lost")).to_have_count(0, timeout=PATIENCE)
    expect(state(page)).to_have_text("finished", timeout=3 * PATIENCE)
    assert waiting.worker() == worker


def test_killed_worker_is_reported_and_replaced(waiting: Studio, page: Page) -> None:
    opened(page, waiting.start())
    page.locator("#now-continue").click()
    worker = waiting.halted()
    expect(page.locator("#now-live")).to_contain_text("per step", timeout=PATIENCE)
    worker.kill()
    expect(state(page)).to_have_text("interrupted", timeout=PATIENCE)
    expect(page.locator("#now-live")).to_contain_text("Nobody works on the queue", timeout=PATIENCE)
    page.locator("#now-continue").click()
    expect(state(page)).to_have_text("finished", timeout=3 * PATIENCE)


def test_full_disk_is_named_and_the_run_goes_on_when_there_is_room(waiting: Studio, page: Page) -> None:
    """A limit on the size of files replaces a full disk, because then the system itself refuses the write."""
    opened(page, waiting.start(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL, UNLIMITED))))
    page.locator("#now-continue").click()
    expect(state(page)).to_have_text("failed", timeout=3 * PATIENCE)
    expect(page.locator("#now-live")).to_contain_text("the disk is full")
    expect(page.locator("#now-live")).to_contain_text("Free some space on the disk, then press Continue")
    assert waiting.process is not None
    for process in (waiting.worker(), psutil.Process(waiting.process.pid)):
        process.rlimit(psutil.RLIMIT_FSIZE, (UNLIMITED, UNLIMITED))
    page.locator("#now-continue").click()
    expect(state(page)).to_have_text("finished", timeout=3 * PATIENCE)
