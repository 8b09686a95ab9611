"""Parallel work: one function applied to many jobs, on several processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")


def on_processes(function: Callable[[Job], Result], jobs: Sequence[Job], workers: int) -> list[Result]:
    """Return the results of all jobs, in order; one worker means this process."""
    if workers == 1:
        return [function(job) for job in jobs]
    with ProcessPoolExecutor(workers) as pool:
        return list(pool.map(function, jobs))
