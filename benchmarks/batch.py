"""Seconds of a batch against as many commands, on the bundled base: `python benchmarks/batch.py`."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from unziplora.models.base import BUNDLED

COMMAND = [sys.executable, "-m", "unziplora"]


def main() -> None:
    """Split copies of one image by commands, by a batch, and by a batch on Ray; print seconds and ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    steps = ["--steps", str(options.steps), "--phrase-steps", str(options.steps // 2)]
    flags = ["--content", "rocket", "--style", "linocut", "--base", "bundled", "--quiet", *steps]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        images = work / "images"
        images.mkdir()
        files = [images / f"{number}.png" for number in range(options.images)]
        for file in files:
            shutil.copy(BUNDLED / "demo" / "first.png", file)
        start = time.monotonic()
        for file in files:
            run(["split", str(file), *flags, "--out", str(work / "commands" / file.stem)])
        commands = time.monotonic() - start
        print(f"{options.images} commands: {commands:.0f} s", flush=True)
        for engine in ("local", "ray"):
            start = time.monotonic()
            run(["batch", str(images), *flags, "--out", str(work / engine), "--engine", engine])
            seconds = time.monotonic() - start
            print(f"batch, engine {engine}: {seconds:.0f} s, {commands / seconds:.2f} × the throughput", flush=True)


def run(arguments: list[str]) -> None:
    """Run one command of unziplora."""
    subprocess.run([*COMMAND, *arguments], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
