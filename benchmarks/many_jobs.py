"""Overhead of the Ray engine: many runs with a stand-in for the training, on this machine's cores.

python benchmarks/many_jobs.py --jobs 10000
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from PIL import Image

from unziplora.config.split import SplitConfig
from unziplora.jobs import remote
from unziplora.jobs.cluster import Reporter
from unziplora.jobs.remote import Parcel, Report, pick_engine
from unziplora.jobs.rows import Row
from unziplora.runs.folder import RunFolder
from unziplora.utils.progress import Callback, Progress

train_run = remote.train_run


def sleep(run: RunFolder, progress: Callback, seconds: float = 0.05) -> None:
    """Take as long as the smallest training, and finish the run."""
    time.sleep(seconds)
    progress(Progress(1, 1))
    run.card.write_text("# cat")


def stand_in(parcel: Parcel, progress: Reporter) -> Report:
    """Handle a run as the engine does, with a sleep for its training."""
    remote.trainer = sleep
    return train_run(parcel, progress)


def main() -> None:
    """Print a line of the table for every tenth of the jobs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=10_000)
    count, cores = parser.parse_args().jobs, os.cpu_count() or 1
    remote.train_run = stand_in
    print("| jobs done | seconds | overhead per job | memory of the driver |\n|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder, "cat.png")
        Image.new("RGB", (64, 64)).save(image)
        words: dict[str, Any] = {"images": [image], "content": "cat", "style": "ink", "base": "bundled"}
        recipes = (SplitConfig(out=Path(folder, str(number)), device="cpu", **words) for number in range(count))
        rows = [Row(str(number), recipe) for number, recipe in enumerate(recipes)]
        start, before = time.perf_counter(), 0
        for done, result in enumerate(pick_engine("ray", "local")(rows, lambda event: None), 1):
            assert result.outcome == "finished", result.reason
            if done == cores:  # processes have started
                start, before = time.perf_counter(), done
            if done % max(1, count // 10) == 0:
                seconds = time.perf_counter() - start
                overhead = 1000 * (seconds * cores / (done - before) - 0.05)
                memory = psutil.Process().memory_info().rss / 2**20
                print(f"| {done} | {seconds:.0f} | {overhead:.0f} ms of a core | {memory:.0f} MiB |", flush=True)


if __name__ == "__main__":
    main()
