"""Search for settings: try the same number of settings from one grid for every method, on the development cases."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import tomli_w
import torch
from pydantic import BaseModel

from unziplora.bench.report import Report, summarize
from unziplora.bench.run import evaluate_methods
from unziplora.bench.session import Session, open_session
from unziplora.config.bench import SEARCHED, BenchConfig
from unziplora.errors import UserError
from unziplora.utils.files import atomic_write
from unziplora.utils.progress import Callback

RATES = (3e-4, 1e-3, 2e-3, 4e-3)
RATIOS = (0.25, 0.5, 1.0)
STEPS = (150, 300, 600)
RANKS = (8, 16, 32)
POINTS = 1024
"""Points of Sobol's sequence that define the order of the grid."""


@dataclass(frozen=True)
class Setting:
    """One point of the grid.

    Attributes:
        rate: learning rate of the content, or of everything if a method has one rate.
        ratio: learning rate of the style divided by that of the content.
        steps: optimizer steps.
        rank: rank of each LoRA.
    """

    rate: float
    ratio: float
    steps: int
    rank: int

    def overrides(self, method: str) -> dict[str, Any]:
        """Return this setting in a method's own keys."""
        size = {"steps": self.steps, "rank": self.rank}
        if method in ("unziplora", "paper"):
            rates = {"content_learning_rate": self.rate, "style_learning_rate": self.rate * self.ratio}
            return {**rates, **size}
        if method == "dreambooth":
            style = {"learning_rate": self.rate * self.ratio, **size}
            return {"content": {"learning_rate": self.rate, **size}, "style": style}
        if method == "ziplora":  # column scales start at 1 and need larger steps; there is no rank to choose
            return {"learning_rate": 10 * self.rate, "steps": max(1, self.steps // 3)}
        return {"learning_rate": self.rate, **size}


class SearchResult(BaseModel):
    """Scores of every setting by method, and the best settings.

    Attributes:
        tried: settings in the order of the search.
        scores: by method, one score per setting.
        means: by method, the arithmetic mean of scaled content and style per setting. It decides between equal scores,
            because a method that is below the base in one half scores 0 with every setting.
        best: by method, the best setting in the method's own keys.
        file: TOML file with the settings, for `--settings`.
    """

    tried: list[dict[str, float]]
    scores: dict[str, list[float]]
    means: dict[str, list[float]]
    best: dict[str, dict[str, Any]]
    file: Path

    def __str__(self) -> str:
        lines = [
            f"{method}: {max(scores):.3f} with the best of {len(scores)} settings"
            for method, scores in self.scores.items()
        ]
        return "\n".join([*lines, f"written to {self.file}"])


def grid_settings(count: int) -> list[Setting]:
    """Return the first settings of the grid in the order of Sobol's sequence, so that even a few spread over it.

    Raises:
        UserError: the grid contains fewer.
    """
    axes = (RATES, RATIOS, STEPS, RANKS)
    settings = [Setting(*values) for values in product(*axes)]
    if count > len(settings):
        raise UserError(f"--search {count} is too large: the grid has {len(settings)} settings")
    points = torch.quasirandom.SobolEngine(len(axes)).draw(POINTS)[1:].tolist()  # the first is a corner of the grid
    indices = [[int(x * len(axis)) for axis, x in zip(axes, point, strict=True)] for point in points]
    spread = [Setting(RATES[a], RATIOS[b], STEPS[c], RANKS[d]) for a, b, c, d in indices]
    return list(dict.fromkeys([*spread, *settings]))[:count]


def search_settings(
    config: BenchConfig, progress: Callback | None = None, session: Session | None = None
) -> SearchResult:
    """Try `config.search` settings for every searchable method; write settings.toml and search.json into `out`.

    Each setting is a benchmark of its own in `out/search/METHOD/NN`. The scale comes from base and oracle with their
    own settings. The score is that of the first measure, a mean over training seeds; `SearchResult.means` decides
    between equal scores. ZipLoRA is searched last, on the best DreamBooth LoRAs. Keys of `config.settings` that the
    grid does not contain apply to all settings, and settings.toml contains them too.

    Args:
        session: default: open the configured benchmark.

    Raises:
        UserError, MachineError, Interrupted: as `run_benchmark`; the same call continues.
    """
    settings = grid_settings(config.search)
    session = session or open_session(config, progress)
    workspace, fixed = session.workspace, session.workspace.overrides
    ends = evaluate_methods(session, ["base", "oracle"])
    names: list[str] = [name for name in SEARCHED if name in config.methods and name in session.methods]
    tried = [asdict(setting) for setting in settings]
    result = SearchResult(tried=tried, scores={}, means={}, best={}, file=workspace.folder / "settings.toml")
    folders: dict[str, Path] = {}
    for name in names:
        outcomes: list[tuple[float, float]] = []
        candidates = [_merge(fixed.get(name, {}), setting.overrides(name)) for setting in settings]
        for number, candidate in enumerate(candidates):
            trial = replace(
                workspace,
                folder=workspace.folder / "search" / name / f"{number:02d}",
                overrides={**fixed, **result.best, name: candidate},
                method_folders=folders,
            )
            results = evaluate_methods(replace(session, workspace=trial), [name])
            outcomes.append(_score(summarize(config, [*ends, *results], [session.measures[0].name]), name))
        best = outcomes.index(max(outcomes))
        result.scores[name], result.means[name] = (list(values) for values in zip(*outcomes, strict=True))
        result.best[name] = candidates[best]
        folders = {**folders, name: workspace.folder / "search" / name / f"{best:02d}"}
    summary = json.dumps(result.model_dump(mode="json", exclude={"file"}), indent=1)
    atomic_write(workspace.folder / "search.json", summary + "\n")
    atomic_write(result.file, tomli_w.dumps({**fixed, **result.best}))
    return result


def _merge(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """Merge two tables and the tables within; `upper` wins."""
    inner = {name: _merge(lower.get(name, {}), value) for name, value in upper.items() if isinstance(value, Mapping)}
    return {**lower, **upper, **inner}


def _score(report: Report, method: str) -> tuple[float, float]:
    """Return the headline, and the arithmetic mean of scaled content and style; means over training seeds.

    Raises:
        UserError: there is no scale.
    """
    rows = [row for row in report.rows if row.method == method]
    seeds = list(rows[0].seeds.values())
    if any("headline" not in figures for figures in seeds):
        raise UserError(
            "the oracle is no better than the base on these cases, so there is no scale to choose settings by: "
            "take more cases or another base"
        )
    halves = [(figures["content.scaled"] + figures["style.scaled"]) / 2 for figures in seeds]
    return fmean(figures["headline"] for figures in seeds), fmean(halves)
