"""Open benchmark: cases, settings, measures and base, all loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from unziplora.bench.cases import Case, load_cases, select_cases
from unziplora.bench.contenders import METHODS, Contender, read_settings
from unziplora.bench.evaluate import evaluate
from unziplora.bench.photos import load_photos, photo_measures
from unziplora.bench.workspace import Workspace
from unziplora.config.bench import BenchConfig
from unziplora.config.recipe import to_toml
from unziplora.errors import UserError, faults_of
from unziplora.metrics.measures import CaseMeasure, Plain, Trained
from unziplora.models.base import Base, open_base
from unziplora.models.device import computing_on
from unziplora.utils.files import atomic_write
from unziplora.utils.progress import Callback

MEASURES: dict[str, Callable[[], CaseMeasure]] = {"trained": Trained, "plain": Plain}


@dataclass
class Session:
    """Benchmark with everything loaded.

    Attributes:
        cases: all cases by slug, because a selected case may need a partner that is not selected.
    """

    workspace: Workspace
    base: Base
    measures: Sequence[CaseMeasure]
    cases: dict[str, Case]
    selection: list[Case]
    methods: dict[str, Contender]
    progress: Callback

    def evaluate(self, method: str, case: str, seed: int) -> dict[str, Any]:
        """Evaluate a method, by name, on a case, by slug. Errors as in `unziplora.bench.evaluate.evaluate`."""
        with computing_on(self.base.device):
            return evaluate(
                self.workspace, self.base, self.measures, self.methods[method], self.cases, self.cases[case], seed
            )


def open_session(
    config: BenchConfig,
    progress: Callback | None = None,
    base: Base | None = None,
    measures: Sequence[CaseMeasure] | None = None,
    cases: dict[str, Case] | None = None,
    methods: dict[str, Contender] | None = None,
) -> Session:
    """Load cases, settings, measures and base. Arguments and errors are those of `run_benchmark`."""
    if config.workers > 1 and any(part is not None for part in (measures, cases, methods)):
        raise ValueError("each worker opens the configured benchmark itself: pass no measures, cases or methods")
    if config.out.exists() and not config.out.is_dir():
        raise UserError(f"--out {config.out} is a file; name a folder for runs, scores and report")
    overrides = read_settings(config.settings)
    measures = measures or load_measures(config)
    base = base or open_base(config.base, config.precision, config.device)
    if cases is None:
        cases = load_photos(config.pictures, base.resolution) if config.pictures else load_cases(config.split)
    selection = select_cases(cases, config.cases, config.quick)
    workspace = Workspace(config, config.out.resolve(), overrides)
    workspace.claim(base)
    atomic_write(workspace.folder / "bench.toml", to_toml(config))
    methods = methods or METHODS
    for name in overrides.keys() & set(config.methods) & methods.keys():
        with faults_of(f"{config.settings}, [{name}]"):
            methods[name].recipes(workspace, selection[0], config.seeds[0])
    return Session(workspace, base, measures, cases, selection, methods, progress or (lambda _: None))


def load_measures(config: BenchConfig) -> Sequence[CaseMeasure]:
    """Load the measures of a configuration.

    Raises:
        UserError: a package is not installed, or a model cannot be loaded.
    """
    if config.pictures is not None:
        return photo_measures(config)
    return [MEASURES[name]() for name in config.measures]
