"""The job `bench`: every method on every case with every seed, then the report."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from unziplora.bench.cases import Case, choose, load_cases
from unziplora.bench.contender import Contender
from unziplora.bench.contenders import METHODS, read_settings
from unziplora.bench.evaluate import evaluate
from unziplora.bench.parallel import fill
from unziplora.bench.published import picture_cases, picture_measures, picture_report, write_picture_report
from unziplora.bench.report import Report, summarise, write_report
from unziplora.bench.workspace import Workplace
from unziplora.config.bench import BenchConfig
from unziplora.config.recipe import to_toml
from unziplora.errors import Interrupted, UserError
from unziplora.metrics.measures import Measure, Plain, Published, Trained
from unziplora.models.base import Base, load_base
from unziplora.models.device import pick_device, pick_dtype
from unziplora.models.offload import gone
from unziplora.utils.files import atomic_write
from unziplora.utils.progress import Callback, Progress

MEASURES: dict[str, Callable[[], Measure]] = {"trained": Trained, "plain": Plain, "published": Published}


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
    results = bench.measure(names)
    if config.pictures is not None:
        report = picture_report(config, results, [measure.name for measure in bench.measures])
        write_picture_report(report, bench.place.folder)
        return report
    report = summarise(config, results, [measure.name for measure in bench.measures])
    write_report(report, results, bench.chosen, bench.place.folder)
    return report


@contextmanager
def _stoppable() -> Iterator[None]:
    """Tell of a stop what continues the benchmark, not the training that was stopped."""
    try:
        yield
    except (Interrupted, KeyboardInterrupt):
        raise Interrupted("stopped, everything done so far is kept; the same command continues") from None


@dataclass
class Bench:
    """A benchmark with everything loaded, which measures methods by name."""

    place: Workplace
    base: Base
    measures: Sequence[Measure]
    cases: dict[str, Case]
    chosen: list[Case]
    methods: dict[str, Contender]
    progress: Callback

    @_stoppable()
    def measure(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """The scores of every method, case and seed; of methods that no seed changes, the first seed's.

        Raises:
            UserError, MachineError, Interrupted: as `evaluate`.
        """
        seeds = {name: self.place.config.training_seeds(name) for name in names}
        units = [
            (name, case, seed)
            for name in names
            for case in self.chosen
            for seed in (seeds[name] if self.methods[name].seeded else seeds[name][:1])
        ]
        if self.place.config.workers > 1:
            keys = [(name, case.slug, seed) for name, case, seed in units]
            with gone(self.base):
                fill(partial(open_bench, self.place.config), self, keys, self.place.config.workers)
        results: list[dict[str, Any]] = []
        start = time.monotonic()
        for done, (name, case, seed) in enumerate(units):
            pace = (time.monotonic() - start) / done if done else 0.0
            message = f"{name}, {case.slug}, seed {seed}"
            self.progress(Progress(done, len(units), seconds_per_step=pace, message=message))
            results.append(evaluate(self.place, self.base, self.measures, self.methods[name], self.cases, case, seed))
        pace = (time.monotonic() - start) / max(1, len(units))
        self.progress(Progress(len(units), len(units), seconds_per_step=pace))
        return results


def open_bench(
    config: BenchConfig,
    progress: Callback | None = None,
    base: Base | None = None,
    measures: Sequence[Measure] | None = None,
    cases: dict[str, Case] | None = None,
    methods: dict[str, Contender] | None = None,
) -> Bench:
    """Load cases, settings, measures and base. Arguments and errors are those of `bench`."""
    if config.workers > 1 and any(part is not None for part in (measures, cases, methods)):
        raise ValueError("several workers open the configured benchmark each: give no measures, cases or methods")
    if config.out.exists() and not config.out.is_dir():
        raise UserError(f"--out {config.out} is a file; give a folder for runs, scores and report")
    overrides = read_settings(config.settings)
    device = pick_device(config.device)
    found: Sequence[Measure] = measures or make_measures(config, device)
    base = base or load_base(config.base, pick_dtype(config.precision, device), device)
    if cases is None:
        cases = picture_cases(config.pictures, base.resolution) if config.pictures else load_cases(config.split)
    chosen = choose(cases, config.cases, config.quick)
    place = Workplace(config, config.out.resolve(), overrides)
    place.claim(base)
    atomic_write(place.folder / "bench.toml", to_toml(config))
    methods = methods or METHODS
    for name in overrides.keys() & set(config.methods) & methods.keys():
        try:
            methods[name].recipes(place, chosen[0], config.seeds[0])
        except UserError as error:
            raise UserError(f"{config.settings}, [{name}]: {error}") from None
    return Bench(place, base, found, cases, chosen, methods, progress or (lambda _: None))


def make_measures(config: BenchConfig, device: torch.device) -> Sequence[Measure]:
    """The measures of a configuration.

    Raises:
        UserError: what one needs is not installed, or a model cannot be loaded.
    """
    if config.pictures is not None:
        return picture_measures(config, device)
    return [MEASURES[name]() for name in config.measures]
