"""Attacks on the server and through the page: it refuses them, and lives."""

import pickle
import socket
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from browsing import DEMO, PATIENCE, Studio, choosing, drop, message, opened, pick, state, tools
from PIL import Image
from playwright.sync_api import Page, expect
from safetensors.torch import load_file, save_file

from unziplora.config.split import SplitConfig
from unziplora.jobs.queue import Queue

SCRIPT = "<img src=x onerror=window.hurt=1>"


def is_unhurt(page: Page) -> bool:
    return page.evaluate("window.hurt === undefined")


def test_two_hundred_connections_leave_the_page_usable(filled: Studio, page: Page) -> None:
    with ExitStack() as stack:
        for number in range(200):
            connection = stack.enter_context(closing(socket.create_connection(("127.0.0.1", filled.port))))
            if number % 2:  # half of them ask, the others only hold their connection
                request = f"GET /gradio_api/queue/data?session_hash={number} HTTP/1.1\r\nHost: 127.0.0.1:{filled.port}"
                connection.sendall(f"{request}\r\n\r\n".encode())
        opened(page, filled)
        expect(state(page)).to_have_text("finished", timeout=PATIENCE)
    page.reload()
    expect(state(page)).to_have_text("finished", timeout=PATIENCE)


def bomb(path: Path) -> None:
    """Write a PNG of 100 kB that claims 900 megapixels."""
    Image.new("1", (30_000, 30_000)).save(path)


def page_of_html(path: Path) -> None:
    path.write_text(f"<html>{SCRIPT}")


@pytest.mark.parametrize("write", [bomb, page_of_html])
def test_file_that_is_no_picture_is_refused_in_the_page(filled: Studio, page: Page, tmp_path: Path, write) -> None:
    write(tmp_path / "cat.png")
    opened(page, filled)
    drop(page, tmp_path / "cat.png")
    expect(message(page)).to_contain_text("cat.png", timeout=PATIENCE)
    drop(page, DEMO)
    tools(page)


def test_pickle_is_refused_in_the_page(filled: Studio, page: Page, tmp_path: Path) -> None:
    file = tmp_path / "ink.safetensors"
    file.write_bytes(pickle.dumps({"weights": 1}))
    choosing(page, file)
    opened(page, filled, "Files")
    page.get_by_role("button", name="Add a LoRA file").locator("visible=true").click()
    expect(message(page)).to_contain_text("ink.safetensors", timeout=PATIENCE)


def test_script_in_words_names_and_headers_does_not_run(studio: Studio, page: Page, trained: Path) -> None:
    words = {"images": [DEMO], "content": SCRIPT, "style": f"{SCRIPT} ink", "base": "bundled"}
    Queue(studio.runs).submit(SplitConfig(**words, out=studio.runs / "rocket"))
    (studio.runs / "loras").mkdir()
    name = "loras/<img src=x onerror=hurt=1>.safetensors"
    weights = load_file(trained / "rocket-style.safetensors")
    save_file(weights, studio.runs / name, {"ss_output_name": SCRIPT, "ss_tag_frequency": SCRIPT, SCRIPT: SCRIPT})
    opened(page, studio)
    expect(page.locator("#now-live")).to_contain_text(SCRIPT, timeout=PATIENCE)
    for tab in ("Runs", "Play", "Files"):
        opened(page, studio, tab)
        page.wait_for_timeout(500)
        assert is_unhurt(page)
    pick(page, "file", name)
    expect(page.locator("#inspection")).not_to_contain_text("No file chosen", timeout=PATIENCE)
    assert is_unhurt(page)
