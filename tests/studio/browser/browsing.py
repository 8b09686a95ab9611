"""A studio in a process of its own, and its page as a browser shows it."""

import mimetypes
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from playwright.sync_api import Locator, Page, expect

from unziplora.config.bases import BUNDLED_BASE
from unziplora.runs.folder import RunFolder

DEMO = BUNDLED_BASE.parent / "demo" / "first.png"
QUICK = {"phrase_steps": 0, "content_variants": "off", "batch_size": 1, "sample_steps": 2, "sample_seeds": 0}
"""Settings of the form with which a step takes a fraction of a second."""

_HALF = 180
"""Half of the side at which the editor shows a square picture, in pixels of the page."""

PATIENCE = 60_000
"""Milliseconds to wait for what another process does."""


class Studio:
    """The server of a runs folder, which can be killed and started again at the same address."""

    def __init__(self, runs: Path) -> None:
        self.runs, self.port = runs, 0
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self, **limits: Any) -> "Studio":
        """Start the server; return when it can be reached."""
        self.runs.mkdir(parents=True, exist_ok=True)
        log = self.runs.parent / "studio.log"  # a pipe that nobody reads would stop the server when it is full
        command = [sys.executable, "-m", "unziplora", "studio", "--no-browser", "--runs", str(self.runs)]
        with log.open("w") as stream:
            self.process = subprocess.Popen(
                [*command, "--port", str(self.port)], stderr=stream, stdout=subprocess.DEVNULL, **limits
            )
        match = until(lambda: re.search(r"http://127\.0\.0\.1:(\d+)", log.read_text()), f"no address in {log}")
        self.port = int(match[1])
        return self

    def kill(self) -> None:
        """End the server as SIGKILL does: it cleans nothing up."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def worker(self) -> psutil.Process:
        """Return the process that trains."""
        mark = until(lambda: next(self.runs.glob(".worker-*"), None), "no worker has started")
        return psutil.Process(int(mark.name.rpartition("-")[2]))

    def halted(self, name: str = "rocket") -> psutil.Process:
        """Halt the worker after a first step of a run, which on a fast machine would end before the page shows it."""
        until(RunFolder(self.runs / name).read_log, f"{name} has not done a step")
        worker = self.worker()
        worker.suspend()
        return worker

    def stop(self) -> None:
        """Stop the server and all workers."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(60)
        for mark in self.runs.glob(".worker-*"):
            with suppress(ProcessLookupError):
                os.kill(int(mark.name.rpartition("-")[2]), signal.SIGKILL)


def until(found: Callable[[], Any], fault: str, seconds: float = PATIENCE / 1000) -> Any:
    """Wait for a value that counts as true, and return it."""
    deadline = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < deadline, fault
        time.sleep(0.2)
    return value


def opened(page: Page, studio: Studio, tab: str = "Split") -> Page:
    """Open the studio in a page, at a tab."""
    page.goto(studio.address)
    expect(page.locator("#stamp")).to_have_text(re.compile("[0-9a-f]{64}"), timeout=PATIENCE)  # the page is alive
    to_tab(page, tab)
    return page


def to_tab(page: Page, name: str) -> None:
    """Choose a tab, which a narrow window may have in a menu."""
    expect(page.locator("#drop, #picture").first).to_be_attached(timeout=PATIENCE)
    tab = page.get_by_role("tab", name=name, exact=True)
    if tab.is_visible():
        tab.click()
    else:
        page.locator(".overflow-menu > button").first.click()
        page.locator(".overflow-dropdown button", has_text=name).click()


def drop(page: Page, file: Path, place: str = "#drop") -> None:
    """Drop a file on a place of the page, as a mouse does it."""
    data = page.evaluate_handle(
        """([name, type, bytes]) => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([new Uint8Array(bytes)], name, { type }));
            return transfer;
        }""",
        [file.name, mimetypes.guess_type(file.name)[0] or "", list(file.read_bytes())],
    )
    page.locator(f"{place} button").first.dispatch_event("drop", {"dataTransfer": data})


def choosing(page: Page, file: Path) -> None:
    """Answer every dialog that asks for a file; to be called early, because the browser learns of it with a delay."""
    page.on("filechooser", lambda dialog: dialog.set_files(file))


def choose(page: Page, field: str, text: str) -> None:
    """Type into a list of suggestions, and leave it."""
    box = page.locator(f"#{field} input")
    box.fill(text)
    box.press("Enter")
    expect(box).to_have_value(text)


def pick(page: Page, field: str, text: str) -> None:
    """Choose one of a list that the server fills."""
    box = page.locator(f"#{field} input")
    offered = page.locator(f"#{field}").get_by_role("option", name=text, exact=True)

    def is_chosen() -> bool:
        box.fill(text)
        page.wait_for_timeout(300)
        if offered.is_visible():
            offered.click()  # Enter would choose the first that contains the text
            return box.input_value() == text
        box.blur()
        return False

    until(is_chosen, f"{text} is not in the list")


def message(page: Page) -> Locator:
    """Return the message that the page shows in its corner."""
    return page.get_by_test_id("toast-body").first


def words(page: Page, content: str = "rocket", style: str = "linocut") -> None:
    """Name the subject and the style."""
    choose(page, "content", content)
    choose(page, "style", style)


def unfold(page: Page, place: str) -> None:
    """Open a folded part of the page, and the parts in it."""
    for button in page.locator(f"{place} button.label-wrap").all():
        if "open" not in (button.get_attribute("class") or ""):
            button.click()
            expect(button).to_have_class(re.compile(r"\bopen\b"))


def advanced(page: Page, **keys: Any) -> None:
    """Fill in settings of the tab Split under Advanced."""
    unfold(page, "#advanced")
    expect(page.locator("#advanced button.label-wrap").nth(1)).to_be_visible(timeout=PATIENCE)
    unfold(page, "#advanced")  # those that the first one has brought into the page
    for name, value in {**QUICK, **keys}.items():
        box = page.locator(f"#split-{name}").locator("input, textarea").first
        box.fill(str(value))
        box.press("Enter")
        box.press("Tab")


def state(page: Page, view: str = "now") -> Locator:
    """Return the word for the state of the run that a view shows."""
    return page.locator(f"#{view}-live .state")


def tools(page: Page) -> None:
    """Wait until the editor of the picture can be used."""
    expect(page.locator("#picture canvas").first).to_be_visible(timeout=PATIENCE)
    expect(page.get_by_role("button", name="Brush", exact=True)).to_be_enabled(timeout=PATIENCE)


def paint(page: Page) -> None:
    """Paint over the middle of the picture."""
    page.get_by_role("button", name="Brush", exact=True).click()
    box = page.locator("#picture canvas").first.bounding_box()
    assert box is not None
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 40, y)
    page.mouse.down()
    page.mouse.move(x + 40, y, steps=3)
    page.mouse.up()


def crop(page: Page) -> None:
    """Take the left half of a square picture away, by the handle of its left edge."""
    page.get_by_role("button", name="Image", exact=True).click()
    page.get_by_role("button", name="Crop", exact=True).click()
    confirm = page.get_by_text("Confirm crop")
    expect(confirm).to_be_visible()
    box = page.locator("#picture canvas").first.bounding_box()
    assert box is not None
    x, y = box["x"] + box["width"] / 2, box["y"] + (box["height"] - 40) / 2
    page.mouse.move(x - _HALF, y)
    page.mouse.down()
    page.mouse.move(x, y, steps=3)
    page.mouse.up()
    confirm.click()
    expect(confirm).to_be_hidden()
    expect(page.locator("#picture .zoom-number")).not_to_have_text("50%", timeout=PATIENCE)  # it is shown anew, large


def loras_in_diffusers(files: list[Path]) -> set[str]:
    """Load LoRA files into a pipeline of diffusers; return the names of those that have changed its UNet."""
    import torch
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(BUNDLED_BASE)
    names = [file.stem.rpartition("-")[2] for file in files]
    for name, file in zip(names, files, strict=True):
        pipe.load_lora_weights(file.parent, weight_name=file.name, adapter_name=name)
    weights = [(key, value) for key, value in pipe.unet.named_parameters() if "lora_B" in key]
    return {name for name in names if any(f".{name}." in key and torch.any(value != 0) for key, value in weights)}
