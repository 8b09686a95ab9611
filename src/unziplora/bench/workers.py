"""Benchmark on several processes, because one training of a small base leaves most of a machine idle."""

from __future__ import annotations

import math
import os
import signal
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from unziplora.bench.cases import Case
from unziplora.bench.session import Session, open_session
from unziplora.config.bench import BenchConfig
from unziplora.jobs.cluster import Cluster, Task
from unziplora.models.device import pick_device
from unziplora.utils.progress import Callback, Progress
from unziplora.utils.signals import STOP, caught

Unit = tuple[str, str, int]
"""Method, slug of a case, training seed."""

_session: Session | None = None  # in a process of the cluster


def group_units(units: Sequence[Unit], cases: Mapping[str, Case]) -> list[list[Unit]]:
    """Group units so that no two groups share a training; the order within a group stays.

    A case and its partner need each other's trainings, and methods build on each other's. Seeds share nothing.
    """
    groups: dict[tuple[frozenset[str], int], list[Unit]] = defaultdict(list)
    for unit in units:
        _, slug, seed = unit
        groups[frozenset((slug, cases[slug].partner)), seed].append(unit)
    return list(groups.values())


def evaluate_on_workers(session: Session, units: Sequence[Unit], workers: int) -> None:
    """Train, sample and score on several processes, so that the benchmark's folder contains the scores of all units.

    Args:
        session: the benchmark.
        units: units to evaluate.
        workers: number of processes; they divide the cores and the GPUs.

    Raises:
        UserError: Ray is not installed.
        UserError, MachineError, Interrupted: as `evaluate`; finished work stays.
    """
    workspace, groups = session.workspace, group_units(units, session.cases)
    cluster = Cluster("local", f"--workers {workers}", cpus=workers)
    on_gpu = pick_device(workspace.config.device).type == "cuda"
    share = 1 / math.ceil(workers / max(1, torch.cuda.device_count())) if on_gpu else 0.0
    threads = max(1, (os.cpu_count() or 1) // workers)
    fields = {name: getattr(workspace, name) for name in ("folder", "overrides", "method_folders")}
    with cluster, caught(signal.default_int_handler, *STOP):
        for group in groups:
            args = (workspace.config, fields, group, threads)
            cluster.submit(Task(_title(group), evaluate_group, args, gpus=share))
        try:
            _follow(cluster, {_title(group): len(group) for group in groups}, session.progress)
        except BaseException:
            for _ in cluster.stop(session.progress):
                pass  # a training saves its step
            raise


def _follow(cluster: Cluster, sizes: Mapping[str, int], progress: Callback) -> None:
    """Report finished groups; raise the first failure."""
    start, done = time.monotonic(), 0
    while cluster.tasks:
        for outcome in cluster.wait(lambda event: None):
            if outcome.error is not None:
                raise outcome.error
            done += sizes[outcome.task.name]
            pace = (time.monotonic() - start) / done
            message = f"{outcome.task.name}: done"
            progress(Progress(done, sum(sizes.values()), seconds_per_step=pace, message=message))


def _title(group: Sequence[Unit]) -> str:
    return f"{', '.join(dict.fromkeys(slug for _, slug, _ in group))}, seed {group[0][2]}"


def evaluate_group(
    config: BenchConfig, fields: Mapping[str, Any], units: Sequence[Unit], threads: int, progress: Callback
) -> None:
    """Evaluate a group of units in a process that keeps cases, measures and base loaded."""
    global _session
    torch.set_num_threads(threads)
    if _session is None or _session.workspace.config != config:
        _session = open_session(config)
    session = replace(_session, workspace=replace(_session.workspace, **fields))
    for unit in units:
        session.evaluate(*unit)
