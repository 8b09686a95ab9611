"""A benchmark with everything loaded: cases, settings, measures and base."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from unziplora.bench.cases import Case, choose, load_cases
from unziplora.bench.contender import Contender
from unziplora.bench.contenders import METHODS, read_settings
from unziplora.bench.published import published_cases, published_measures
from unziplora.bench.workspace import Workspace
from unziplora.config.bench import BenchConfig
from unziplora.config.recipe import to_toml
from unziplora.errors import UserError
from unziplora.metrics.measures import Measure, Plain, Trained
from unziplora.models.base import Base, load_base
from unziplora.models.device import pick_device, pick_dtype
from unziplora.utils.files import atomic_write
from unziplora.utils.progress import Callback

MEASURES: dict[str, Callable[[], Measure]] = {"trained": Trained, "plain": Plain}


@dataclass
class Bench:
    """A benchmark with everything loaded, ready to measure methods by name."""

    place: Workspace
    base: Base
    measures: Sequence[Measure]
    cases: dict[str, Case]
    chosen: list[Case]
    methods: dict[str, Contender]
    progress: Callback


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
        cases = published_cases(config.pictures, base.resolution) if config.pictures else load_cases(config.split)
    chosen = choose(cases, config.cases, config.quick)
    place = Workspace(config, config.out.resolve(), overrides)
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
        return published_measures(config, device)
    return [MEASURES[name]() for name in config.measures]
