"""Functions that tests run as Ray tasks in place of `unziplora.bench.workers.evaluate_group`."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from unziplora.config.bench import BenchConfig
from unziplora.utils.progress import Callback


def slow(config: BenchConfig, fields: Mapping[str, Any], units: Sequence[Any], threads: int, view: Callback) -> None:
    """Take no time for seed 0, and very long for every other seed."""
    ((_, case, seed),) = units
    file = fields["folder"] / f"{case}-{seed}"
    try:
        file.write_text("begun")
        for _ in range(0 if seed == 0 else 6000):
            time.sleep(0.1)  # the interruption waits for the end of a call
    except KeyboardInterrupt:
        file.write_text("stopped")
        raise


def quick(config: BenchConfig, fields: Mapping[str, Any], units: Sequence[Any], threads: int, view: Callback) -> None:
    """Draw a color instead of sampling."""
    from fakes import draw

    from unziplora.bench import evaluate, workers

    evaluate.sample_task = lambda base, task, seeds, *_: draw(base, task.prompts, seeds)
    workers.evaluate_group(config, fields, units, threads, view)
