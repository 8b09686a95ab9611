"""A benchmark on several processes: one training of a small base leaves most of a machine idle."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import replace
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import torch

from unziplora.bench.cases import Case
from unziplora.bench.evaluate import evaluate
from unziplora.bench.session import Bench
from unziplora.bench.workspace import Workspace
from unziplora.errors import Interrupted
from unziplora.models.device import pick_device
from unziplora.utils.progress import Callback, Progress
from unziplora.utils.signals import caught

Unit = tuple[str, str, int]
"""A method, a case's slug and a training seed."""

_opened: Bench | None = None  # of a worker process
_stop: Event | None = None


def groups(units: Sequence[Unit], cases: Mapping[str, Case]) -> list[list[Unit]]:
    """Units that share no training with those of another group, each in the given order.

    A case and its partner need each other's trainings, and methods build on each other's; seeds share nothing.
    """
    found: dict[tuple[frozenset[str], int], list[Unit]] = defaultdict(list)
    for unit in units:
        _, slug, seed = unit
        found[frozenset((slug, cases[slug].partner)), seed].append(unit)
    return list(found.values())


def fill(open_bench: Callable[[], Bench], bench: Bench, units: Sequence[Unit], workers: int) -> None:
    """Have processes train, sample and score, so that every unit's scores are in the benchmark's folder.

    Args:
        open_bench: opens the same benchmark in another process.
        bench: whose folder is filled.
        units: what is wanted.
        workers: processes; they share the cores, and the GPUs by turns.

    Raises:
        UserError, MachineError, Interrupted: as `evaluate`; what is done so far is kept.
    """
    parts, place = groups(units, bench.cases), bench.place
    context = multiprocessing.get_context("spawn")  # a forked copy of torch's threads or of CUDA does not work
    numbers: Queue[int] = context.Queue()
    for number in range(workers):
        numbers.put(number)
    stop = context.Event()
    threads = max(1, (os.cpu_count() or 1) // workers)
    gpus = torch.cuda.device_count() if pick_device(place.config.device).type == "cuda" else 0
    setup = (open_bench, numbers, threads, gpus, stop)
    with ProcessPoolExecutor(min(workers, len(parts)), context, _open, setup) as pool:
        work = [pool.submit(_do, part, place.folder, dict(place.overrides), dict(place.homes)) for part in parts]
        try:
            with caught(signal.default_int_handler, signal.SIGTERM):  # ends as Ctrl-C does, no worker is left behind
                _follow(work, [len(part) for part in parts], bench.progress)
        except BaseException:
            stop.set()  # what a worker has been given already cannot be canceled
            for worker in multiprocessing.active_children():
                worker.terminate()  # a training saves its step first
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _follow(work: Sequence[Future[str]], sizes: Sequence[int], progress: Callback) -> None:
    """Tell what is done; raise the first failure."""
    start, done, left = time.monotonic(), 0, set(work)
    while left:
        finished, left = wait(left, return_when=FIRST_COMPLETED)
        for future in finished:
            done += sizes[work.index(future)]
            pace = (time.monotonic() - start) / done
            progress(Progress(done, sum(sizes), seconds_per_step=pace, message=future.result()))


def _open(open_bench: Callable[[], Bench], numbers: Queue[int], threads: int, gpus: int, stop: Event) -> None:
    """Load cases, measures and base in a worker process, which ends with the process that started it."""
    global _opened, _stop
    _stop = stop
    if hasattr(os, "setsid"):
        os.setsid()  # away from the terminal, whose Ctrl-C would be a training's second request to stop
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    if gpus:
        torch.cuda.set_device(numbers.get() % gpus)
    _opened = open_bench()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _do(units: Sequence[Unit], folder: Path, overrides: dict[str, Any], homes: dict[str, Path]) -> str:
    """Do a group of units in a worker process; return a line about it."""
    assert _opened is not None
    assert _stop is not None
    bench = _opened
    place: Workspace = replace(bench.place, folder=folder, overrides=overrides, homes=homes)
    for name, slug, seed in units:
        if _stop.is_set():
            raise Interrupted("stopped")
        evaluate(place, bench.base, bench.measures, bench.methods[name], bench.cases, bench.cases[slug], seed)
    return f"{', '.join(dict.fromkeys(slug for _, slug, _ in units))}, seed {units[0][2]}: done"
