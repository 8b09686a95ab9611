"""Run of a benchmark: evaluate every method on every case with every seed, then write the report."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from unziplora.bench.cases import Case
from unziplora.bench.contenders import Contender
from unziplora.bench.photos import summarize_photos, write_photo_report
from unziplora.bench.report import Report, summarize, write_report
from unziplora.bench.session import Session, open_session
from unziplora.bench.workers import evaluate_on_workers
from unziplora.config.bench import BenchConfig
from unziplora.errors import Interrupted
from unziplora.metrics.measures import CaseMeasure
from unziplora.models.base import Base
from unziplora.models.offload import base_on_cpu
from unziplora.utils.progress import Callback, Progress

STORED = 0.5
"""Seconds that a result takes at most if it is stored already."""


def run_benchmark(
    config: BenchConfig,
    progress: Callback | None = None,
    *,
    base: Base | None = None,
    measures: Sequence[CaseMeasure] | None = None,
    cases: dict[str, Case] | None = None,
    methods: dict[str, Contender] | None = None,
) -> Report:
    """Measure the configured methods; write report.json, report.md and a contact sheet per case into `out`.

    Results of an earlier call with the same settings are reused: trainings, images, scores.

    Args:
        progress: called before every method, case and seed.
        base: base to sample with; default: the configured one.
        measures: default: the configured ones.
        cases, methods: default: those of the package.

    Raises:
        UserError: a case, a setting or a measure does not exist; `out` contains a run with other settings.
        MachineError: out of memory, disk full, no permission.
        Interrupted: stopped on request; the same call continues.
    """
    session = open_session(config, progress, base, measures, cases, methods)
    names = [name for name in config.methods if name in session.methods]
    if config.pictures is not None:
        names = [name for name in names if name != "oracle"]  # it learns from the truth, which photos lack
    results = evaluate_methods(session, names)
    measure_names = [measure.name for measure in session.measures]
    if config.pictures is not None:
        report = summarize_photos(config, results, measure_names)
        write_photo_report(report, session.workspace.folder)
        return report
    report = summarize(config, results, measure_names)
    write_report(report, results, session.selection, session.workspace.folder)
    return report


@contextmanager
def resumable() -> Iterator[None]:
    """Report an interruption as one of the benchmark, not of the training that was running."""
    try:
        yield
    except (Interrupted, KeyboardInterrupt):
        raise Interrupted("stopped; all finished work is saved, and the same command continues") from None


@resumable()
def evaluate_methods(session: Session, names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the scores of every method, case and seed; a method without training has the first seed only.

    Raises:
        UserError, MachineError, Interrupted: as `Session.evaluate`.
    """
    config = session.workspace.config
    units: list[tuple[str, str, int]] = []
    for name in names:
        seeds = config.training_seeds(name)
        seeds = seeds if session.methods[name].seeded else seeds[:1]
        units += [(name, case.slug, seed) for case in session.selection for seed in seeds]
    if config.workers > 1:
        with base_on_cpu(session.base):
            evaluate_on_workers(session, units, config.workers)
    results: list[dict[str, Any]] = []
    spent: list[float] = []
    for done, (name, case, seed) in enumerate(units):
        message = f"{name}, {case}, seed {seed}"
        session.progress(Progress(done, len(units), seconds_per_step=_mean(spent), message=message))
        start = time.monotonic()
        results.append(session.evaluate(name, case, seed))
        spent.append(time.monotonic() - start)
    session.progress(Progress(len(units), len(units), seconds_per_step=_mean(spent)))
    return results


def _mean(spent: Sequence[float]) -> float:
    """Return the mean seconds of the units that were not stored already: reading one takes milliseconds."""
    worked = [seconds for seconds in spent if seconds > STORED]
    return sum(worked) / max(1, len(worked))
