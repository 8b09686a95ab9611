"""Fair play: the same number of settings, from one grid, tried for every method on the development cases."""

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

from unziplora.bench.bench import measure
from unziplora.bench.report import Report, summarize
from unziplora.bench.session import Bench, open_bench
from unziplora.config.bench import SEARCHED, BenchConfig
from unziplora.errors import UserError
from unziplora.utils.files import atomic_write
from unziplora.utils.progress import Callback

RATES = (3e-4, 1e-3, 2e-3, 4e-3)
RATIOS = (0.25, 0.5, 1.0)
STEPS = (150, 300, 600)
RANKS = (8, 16, 32)
SPREAD = 1024
"""Points of Sobol's sequence that say in which order the grid is tried."""


@dataclass(frozen=True)
class Setting:
    """One point of the grid.

    Attributes:
        rate: learning rate of the content, or of everything where there is one rate.
        ratio: learning rate of the style, in parts of the content's.
        steps: optimizer steps.
        rank: of each LoRA.
    """

    rate: float
    ratio: float
    steps: int
    rank: int

    def overrides(self, method: str) -> dict[str, Any]:
        """This setting in a method's own keys."""
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


class Search(BaseModel):
    """What a search found: every setting's score by method, and the best.

    Attributes:
        tried: the settings, in order.
        scores: by method, one score per setting.
        means: the same with the plain mean of scaled content and style, which decides where scores are equal: a
            method that is below the base in one half has the score 0 with every setting.
        best: by method, the best setting in the method's own keys.
        file: the settings as TOML, for `--settings`.
    """

    tried: list[dict[str, float]]
    scores: dict[str, list[float]]
    means: dict[str, list[float]]
    best: dict[str, dict[str, Any]]
    file: Path

    def __str__(self) -> str:
        lines = [f"{method}: {max(scores):.3f} of {len(scores)} settings" for method, scores in self.scores.items()]
        return "\n".join([*lines, f"settings {self.file}"])


def grid(count: int) -> list[Setting]:
    """The first settings of the grid, in the order of Sobol's sequence: already the first few are spread over it.

    Raises:
        UserError: the grid has fewer.
    """
    axes = (RATES, RATIOS, STEPS, RANKS)
    every = [Setting(*values) for values in product(*axes)]
    if count > len(every):
        raise UserError(f"--search {count}: the grid has {len(every)} settings")
    points = torch.quasirandom.SobolEngine(len(axes)).draw(SPREAD)[1:].tolist()  # the first is a corner of the grid
    places = [[int(x * len(axis)) for axis, x in zip(axes, point, strict=True)] for point in points]
    spread = [Setting(RATES[a], RATIOS[b], STEPS[c], RANKS[d]) for a, b, c, d in places]
    return list(dict.fromkeys([*spread, *every]))[:count]


def search(config: BenchConfig, progress: Callback | None = None, bench: Bench | None = None) -> Search:
    """Try `config.search` settings for every searchable method and write settings.toml and search.json into `out`.

    Each setting is a benchmark of its own in `out/search/NN`; the scale is that of base and oracle as they are. The
    score is the first measure's, the mean over training seeds; where scores are equal, `Search.means` decides.
    ZipLoRA is searched last, on the best DreamBooth. What `config.settings` says beyond what is tried holds for all,
    and stands in settings.toml too.

    Args:
        bench: use this one, instead of opening one.

    Raises:
        UserError, MachineError, Interrupted: as `bench`; the same call continues.
    """
    settings = grid(config.search)
    bench = bench or open_bench(config, progress)
    ends = measure(bench, ["base", "oracle"])
    names: list[str] = [name for name in SEARCHED if name in config.methods and name in bench.methods]
    scores: dict[str, list[float]] = {}
    means: dict[str, list[float]] = {}
    best: dict[str, dict[str, Any]] = {}
    homes: dict[str, Path] = {}
    given = bench.place.overrides
    for name in names:
        folders = [bench.place.folder / "search" / name / f"{number:02d}" for number in range(len(settings))]
        found: list[tuple[float, float]] = []
        keys = [_over(given.get(name, {}), setting.overrides(name)) for setting in settings]
        for folder, those in zip(folders, keys, strict=True):
            overrides = {**given, **best, name: those}
            place = replace(bench.place, folder=folder, overrides=overrides, homes=homes)
            results = measure(replace(bench, place=place), [name])
            found.append(_score(summarize(config, [*ends, *results], [bench.measures[0].name]), name))
        winner = found.index(max(found))
        scores[name], means[name] = [score for score, _ in found], [mean for _, mean in found]
        best[name], homes = keys[winner], {**homes, name: folders[winner]}
    file = bench.place.folder / "settings.toml"
    tried = [asdict(setting) for setting in settings]
    result = Search(tried=tried, scores=scores, means=means, best=best, file=file)
    told = json.dumps(result.model_dump(mode="json", exclude={"file"}), indent=1)
    atomic_write(bench.place.folder / "search.json", told + "\n")
    atomic_write(file, tomli_w.dumps({**given, **best}))
    return result


def _over(given: Mapping[str, Any], tried: Mapping[str, Any]) -> dict[str, Any]:
    """The keys given with those of a setting above them, in tables within too."""
    inner = {name: _over(given.get(name, {}), value) for name, value in tried.items() if isinstance(value, Mapping)}
    return {**given, **tried, **inner}


def _score(report: Report, method: str) -> tuple[float, float]:
    """The headline, and the mean of scaled content and style, means over training seeds.

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
