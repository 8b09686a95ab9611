"""Measure every method on every case with every seed, then write the report."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from unziplora.bench.cases import Case
from unziplora.bench.contender import Contender
from unziplora.bench.evaluate import evaluate
from unziplora.bench.parallel import fill
from unziplora.bench.published import published_report, write_published_report
from unziplora.bench.report import Report, summarize, write_report
from unziplora.bench.session import Bench, open_bench
from unziplora.config.bench import BenchConfig
from unziplora.errors import Interrupted
from unziplora.metrics.measures import Measure
from unziplora.models.base import Base
from unziplora.models.offload import base_on_cpu
from unziplora.utils.progress import Callback, Progress


def bench(
    config: BenchConfig,
    progress: Callback | None = None,
    *,
    base: Base | None = None,
    measures: Sequence[Measure] | None = None,
    cases: dict[str, Case] | None = None,
    methods: dict[str, Contender] | None = None,
) -> Report:
    """Measure the configured methods; write report.json, report.md and a contact sheet per case into `out`.

    What an earlier call with the same settings has done is kept: trainings, pictures, scores.

    Args:
        config: the recipe.
        progress: told after every method, case and seed.
        base: sample with this one, instead of loading the configured one.
        measures: compare by these, instead of the configured ones.
        cases: instead of those that ship with the package.
        methods: instead of those that ship with the package.

    Raises:
        UserError: a case, a setting or a measure is not known; a run with other settings is in `out`.
        MachineError: out of memory, disk full, no permission.
        Interrupted: stopped on request; the same call continues.
    """
    bench = open_bench(config, progress, base, measures, cases, methods)
    names = [name for name in config.methods if name in bench.methods]
    if config.pictures is not None:
        names = [name for name in names if name != "oracle"]  # it learns from the truth, and there is none
    results = measure(bench, names)
    if config.pictures is not None:
        report = published_report(config, results, [measure.name for measure in bench.measures])
        write_published_report(report, bench.place.folder)
        return report
    report = summarize(config, results, [measure.name for measure in bench.measures])
    write_report(report, results, bench.chosen, bench.place.folder)
    return report


@contextmanager
def _stoppable() -> Iterator[None]:
    """Tell of a stop what continues the benchmark, not the training that was stopped."""
    try:
        yield
    except (Interrupted, KeyboardInterrupt):
        raise Interrupted("stopped, everything done so far is kept; the same command continues") from None


@_stoppable()
def measure(bench: Bench, names: Sequence[str]) -> list[dict[str, Any]]:
    """The scores of every method, case and seed; of methods that no seed changes, the first seed's.

    Raises:
        UserError, MachineError, Interrupted: as `evaluate`.
    """
    seeds = {name: bench.place.config.training_seeds(name) for name in names}
    units = [
        (name, case, seed)
        for name in names
        for case in bench.chosen
        for seed in (seeds[name] if bench.methods[name].seeded else seeds[name][:1])
    ]
    if bench.place.config.workers > 1:
        keys = [(name, case.slug, seed) for name, case, seed in units]
        with base_on_cpu(bench.base):
            fill(partial(open_bench, bench.place.config), bench, keys, bench.place.config.workers)
    results: list[dict[str, Any]] = []
    start = time.monotonic()
    for done, (name, case, seed) in enumerate(units):
        pace = (time.monotonic() - start) / done if done else 0.0
        message = f"{name}, {case.slug}, seed {seed}"
        bench.progress(Progress(done, len(units), seconds_per_step=pace, message=message))
        results.append(evaluate(bench.place, bench.base, bench.measures, bench.methods[name], bench.cases, case, seed))
    pace = (time.monotonic() - start) / max(1, len(units))
    bench.progress(Progress(len(units), len(units), seconds_per_step=pace))
    return results
