"""Seconds, memory and processor of the idle studio, without and with a page open: `python benchmarks/studio.py`."""

from __future__ import annotations

import argparse
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import closing
from pathlib import Path

import psutil
from playwright.sync_api import Page, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def main() -> None:
    """Start a studio on an empty folder, open its page in headless Chromium, and print a line for each measurement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=40, help="to watch the idle server for")
    seconds = parser.parse_args().seconds
    program = next((path for name in NAMES if (path := shutil.which(name))), None)
    if program is None:
        sys.exit(f"no browser: install Chromium, or Chrome, as one of {', '.join(NAMES)} on the PATH")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        address, start = f"http://127.0.0.1:{free_port()}", time.monotonic()
        server = studio(Path(folder), address)
        try:
            wait_for(address)
            print(
                f"command to a page that answers: {time.monotonic() - start:.1f} s, {used(server):.1f} s of processor"
            )
            print(f"without a page: {idle(server, seconds)}", flush=True)
            browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
            print(f"page opened to the place for a picture: {seconds_to_open(browser.new_page(), address):.1f} s")
            time.sleep(20)  # until torch is imported, which the page asks for
            print(f"with a page: {idle(server, seconds)}")
            browser.close()
        finally:
            server.terminate()
            server.wait()


def free_port() -> int:
    """Return a port on which nobody listens."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def studio(runs: Path, address: str) -> psutil.Popen:
    """Start the server of a runs folder."""
    flags = ["--no-browser", "--runs", str(runs), "--port", address.rpartition(":")[2]]
    return psutil.Popen([sys.executable, "-m", "unziplora", "studio", *flags], stderr=subprocess.DEVNULL)


def wait_for(address: str) -> None:
    """Wait until the server answers a request for its page."""
    while True:
        try:
            urllib.request.urlopen(address).read()
            return
        except OSError:
            time.sleep(0.05)


def used(server: psutil.Popen) -> float:
    """Return the seconds of processor that the server has used."""
    times = server.cpu_times()
    return times.user + times.system


def idle(server: psutil.Popen, seconds: float) -> str:
    """Watch the server; return its share of a core and its memory."""
    before = used(server)
    time.sleep(seconds)
    share = (used(server) - before) / seconds
    return f"{share:.1%} of one core, {server.memory_info().rss / 2**20:.0f} MiB"


def seconds_to_open(page: Page, address: str) -> float:
    """Open the page; return the seconds until a picture can be dropped."""
    start = time.monotonic()
    page.goto(address)
    page.locator("#drop button").first.wait_for()
    return time.monotonic() - start


if __name__ == "__main__":
    main()
