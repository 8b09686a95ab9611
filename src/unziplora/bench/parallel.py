"""Benchmark on several processes, because one training of a small base leaves most of a machine idle."""

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
from typing import TYPE_CHECKING, Any

import torch

from unziplora.errors import Interrupted
from unziplora.models.device import pick_device
from unziplora.utils.progress import Callback, Progress
from unziplora.utils.signals import STOP, caught

if TYPE_CHECKING:
    from unziplora.bench.cases import Case
    from unziplora.bench.session import Session

Unit = tuple[str, str, int]
"""Method, slug of a case, training seed."""

_session: Session | None = None  # in a worker process
_stop: Event | None = None


def group_units(units: Sequence[Unit], cases: Mapping[str, Case]) -> list[list[Unit]]:
    """Group units so that no two groups share a training; the order within a group stays.

    A case and its partner need each other's trainings, and methods build on each other's. Seeds share nothing.
    """
    groups: dict[tuple[frozenset[str], int], list[Unit]] = defaultdict(list)
    for unit in units:
        _, slug, seed = unit
        groups[frozenset((slug, cases[slug].partner)), seed].append(unit)
    return list(groups.values())


def evaluate_in_parallel(
    open_session: Callable[[], Session], session: Session, units: Sequence[Unit], workers: int
) -> None:
    """Train, sample and score on several processes, so that the benchmark's folder contains the scores of all units.

    Args:
        open_session: opens the same benchmark in another process.
        session: the benchmark.
        units: units to evaluate.
        workers: number of processes; they divide the cores, and take the GPUs in turn.

    Raises:
        UserError, MachineError, Interrupted: as `evaluate`; finished work stays.
    """
    groups, workspace = group_units(units, session.cases), session.workspace
    context = multiprocessing.get_context("spawn")  # a forked copy of torch's threads or of CUDA does not work
    numbers: Queue[int] = context.Queue()
    for number in range(workers):
        numbers.put(number)
    stop = context.Event()
    threads = max(1, (os.cpu_count() or 1) // workers)
    gpus = torch.cuda.device_count() if pick_device(workspace.config.device).type == "cuda" else 0
    setup = (open_session, numbers, threads, gpus, stop)
    with ProcessPoolExecutor(min(workers, len(groups)), context, _start_worker, setup) as pool:
        fields = workspace.folder, dict(workspace.overrides), dict(workspace.method_folders)
        work = [pool.submit(_evaluate_group, group, *fields) for group in groups]
        try:
            with caught(signal.default_int_handler, *STOP):  # like Ctrl-C, so that no worker remains
                _follow(work, [len(group) for group in groups], session.progress)
        except BaseException:
            stop.set()  # a group that a worker has received cannot be canceled
            for worker in multiprocessing.active_children():
                worker.terminate()  # a training saves its step first
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _follow(work: Sequence[Future[str]], sizes: Sequence[int], progress: Callback) -> None:
    """Report finished groups; raise the first failure."""
    start, done, left = time.monotonic(), 0, set(work)
    while left:
        finished, left = wait(left, return_when=FIRST_COMPLETED)
        for future in finished:
            done += sizes[work.index(future)]
            pace = (time.monotonic() - start) / done
            progress(Progress(done, sum(sizes), seconds_per_step=pace, message=future.result()))


def _start_worker(
    open_session: Callable[[], Session], numbers: Queue[int], threads: int, gpus: int, stop: Event
) -> None:
    """Load cases, measures and base in a worker process, which ends with its parent process."""
    global _session, _stop
    _stop = stop
    if hasattr(os, "setsid"):
        os.setsid()  # otherwise the terminal's Ctrl-C would be a training's second request to stop
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    if gpus:
        torch.cuda.set_device(numbers.get() % gpus)
    _session = open_session()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _evaluate_group(
    units: Sequence[Unit], folder: Path, overrides: dict[str, Any], method_folders: dict[str, Path]
) -> str:
    """Evaluate a group of units in a worker process; return a message for the user."""
    assert _session is not None
    assert _stop is not None
    workspace = replace(_session.workspace, folder=folder, overrides=overrides, method_folders=method_folders)
    session = replace(_session, workspace=workspace)
    for unit in units:
        if _stop.is_set():
            raise Interrupted("stopped")
        session.evaluate(*unit)
    return f"{', '.join(dict.fromkeys(slug for _, slug, _ in units))}, seed {units[0][2]}: done"
