"""A headless Chromium, and studios that it opens."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("gradio")
pytest.importorskip("playwright")

from browsing import Studio
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

import unziplora
from unziplora.config.bases import BUNDLED_BASE

_FLAGS = ("headless", "no-sandbox", "disable-gpu", "no-first-run", "disable-background-networking",
          "disable-component-update", "disable-sync")  # fmt: skip
_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this folder: `make test-studio` runs them, the quick tests do not."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.browser)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    program = next((path for name in _NAMES if (path := shutil.which(name))), None)
    if program is None:
        pytest.fail(f"no browser: install Chromium, or Chrome, as one of {', '.join(_NAMES)} on the PATH")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=[f"--{flag}" for flag in _FLAGS])
        yield browser
        browser.close()


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    with browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True) as context:
        yield context


@pytest.fixture
def page(context: BrowserContext) -> Page:
    return context.new_page()


@pytest.fixture
def studio(tmp_path: Path) -> Iterator[Studio]:
    """A studio without runs."""
    studio = Studio(tmp_path / "runs").start()
    yield studio
    studio.stop()


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps on the bundled base. Read only: `filled` has a copy of it."""
    folder = tmp_path_factory.mktemp("trained") / "rocket"
    unziplora.split(
        BUNDLED_BASE.parent / "demo" / "first.png", content="rocket", style="linocut", base="bundled", out=folder,
        steps=2, phrase_steps=0, content_variants=False, batch_size=1, sample_steps=1, sample_seeds=[0], rank=4,
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def filled(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    """A studio with a finished run, shared by the tests of a module."""
    runs = tmp_path_factory.mktemp("filled") / "runs"
    shutil.copytree(trained, runs / "rocket")
    studio = Studio(runs).start()
    yield studio
    studio.stop()
