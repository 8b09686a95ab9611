"""What the benchmark found: report.json, report.md, and a contact sheet of every case."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import BaseModel

from unziplora.bench.cases import Case
from unziplora.bench.scores import CONTENT, STYLE, Figures, headline, mean_figures, spread
from unziplora.config.bench import ABLATION, BenchConfig
from unziplora.images.sheet import sheet
from unziplora.utils.files import atomic_write, write_png

ENLARGED = 2
"""Pictures on contact sheets are enlarged by this factor, for labels that can be read."""

COLUMNS = {
    "headline": "score",
    "content.scaled": "content",
    "style.scaled": "style",
    "both.score": "together",
    "mix.score": "mixed",
    "content.leak": "style leak",
    "style.leak": "content leak",
}
RAW = {
    CONTENT: "content score",
    "content.content": "drawing",
    "content.style": "obeys style",
    STYLE: "style score",
    "style.style": "style",
    "style.content": "obeys concept",
}
LEGEND = """- content: the content alone in other styles; style: the style alone on other concepts. Each is the
  geometric mean of two similarities to the truth, scaled so that 0 is the base without LoRA and 1 the oracle.
- score: the harmonic mean of content and style.
- together: both LoRAs against the picture itself; mixed: the content in the style of the partner case, against that
  very picture (not scaled).
- style leak, content leak: how much more the content alone resembles the picture's style, and the style alone the
  picture's drawing, than the truth does; 0 is none.
- ± is the standard deviation over training seeds.
"""


class Row(BaseModel):
    """One method by one measure: each figure by training seed, means over cases."""

    method: str
    measure: str
    seeds: dict[int, Figures]
    cases: dict[str, Figures]

    def formatted(self, name: str) -> str:
        """A figure as mean ± spread over training seeds, or a dash."""
        values = [figures[name] for figures in self.seeds.values() if name in figures]
        if not values:
            return "–"
        middle, deviation = spread(values)
        return f"{middle:.3f}" + (f" ± {deviation:.3f}" if deviation is not None else "")


class Report(BaseModel):
    """Everything found: a row per method and measure; the first measure makes the headline."""

    config: dict[str, Any]
    version: str
    measures: list[str]
    rows: list[Row]

    def __str__(self) -> str:
        return table(self.of(self.measures[0]), COLUMNS)

    def of(self, measure: str) -> list[Row]:
        """The rows of one measure."""
        return [row for row in self.rows if row.measure == measure]


def summarize(config: BenchConfig, results: Sequence[Mapping[str, Any]], measures: Sequence[str]) -> Report:
    """Means over pictures, then over cases, then the scale; of every method, measure and training seed.

    Args:
        results: what `evaluate` returned, one for each method, case and seed.
    """
    methods = list(dict.fromkeys(result["method"] for result in results))
    rows = [_row(method, measure, results) for measure in measures for method in methods]
    for measure in measures:
        ends = {row.method: mean_figures(row.seeds.values()) for row in rows if row.measure == measure}
        for row in rows:
            if row.measure == measure and ends.keys() >= {"base", "oracle"}:
                for figures in row.seeds.values():
                    figures.update(headline(figures, ends["base"], ends["oracle"]))
    told = config.model_dump(mode="json", exclude={"out"})
    return Report(config=told, version=version("unziplora"), measures=list(measures), rows=rows)


def _row(method: str, measure: str, results: Sequence[Mapping[str, Any]]) -> Row:
    mine = [result for result in results if result["method"] == method]
    found = [(result["seed"], result["case"], picture_means(result, measure)) for result in mine]
    seeds, cases = (list(dict.fromkeys(result[key] for result in mine)) for key in ("seed", "case"))
    return Row(
        method=method,
        measure=measure,
        seeds={seed: mean_figures(figures for other, _, figures in found if other == seed) for seed in seeds},
        cases={case: mean_figures(figures for _, other, figures in found if other == case) for case in cases},
    )


def picture_means(result: Mapping[str, Any], measure: str) -> Figures:
    """Means over the pictures of each task of one result, by `task.figure`."""
    rows = [
        {f"{picture['task']}.{name}": value for name, value in picture["values"][measure].items()}
        for picture in result["pictures"]
    ]
    return mean_figures(rows)


def table(rows: Sequence[Row], columns: Mapping[str, str]) -> str:
    """Methods × figures as Markdown."""
    lines = ["| method | " + " | ".join(columns.values()) + " |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {row.method} | " + " | ".join(row.formatted(name) for name in columns) + " |" for row in rows]
    return "\n".join(lines)


def markdown(report: Report) -> str:
    """The whole report as Markdown."""
    config, first = report.config, report.of(report.measures[0])
    seeds = ", ".join(str(seed) for seed in dict.fromkeys(seed for row in first for seed in row.seeds))
    cases = len({case for row in first for case in row.cases})
    parts = [
        f"# Benchmark, {config['split']} cases\n",
        f"unziplora {report.version}, base {config['base']}, {cases} cases, training seeds {seeds}, "
        f"{config['samples']} pictures per prompt; measured by {report.measures[0]}.\n",
        table(first, COLUMNS) + "\n",
        LEGEND,
    ]
    steps = [row for name in ABLATION for row in first if row.method == name]
    if len(steps) > 1:
        parts.append("## Ablation: one separation more in each row\n\n" + table(steps, COLUMNS) + "\n")
    for measure in report.measures:
        rows, scaled = report.of(measure), dict(list(COLUMNS.items())[:3])
        parts.append(f"## Measured by {measure}, not scaled\n\n" + table(rows, {**scaled, **RAW}) + "\n")
    parts += ["## Per case: content score / style score, not scaled\n", _per_case(first), ""]
    return "\n".join(parts)


def _per_case(rows: Sequence[Row]) -> str:
    cases = dict.fromkeys(case for row in rows for case in row.cases)
    lines = ["| case | " + " | ".join(row.method for row in rows) + " |", "|---" * (len(rows) + 1) + "|"]
    for case in cases:
        cells = [
            f"{row.cases[case][CONTENT]:.2f} / {row.cases[case][STYLE]:.2f}" if case in row.cases else "–"
            for row in rows
        ]
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_report(report: Report, results: Sequence[Mapping[str, Any]], cases: Sequence[Case], folder: Path) -> None:
    """Write the contact sheets, report.json and report.md.

    Raises:
        MachineError: disk full, no permission.
    """
    for case in cases:
        mine = [result for result in results if result["case"] == case.slug]
        write_png(folder / "sheets" / f"{case.slug}.png", contact_sheet(case, mine, folder))
    atomic_write(folder / "report.json", report.model_dump_json(indent=1) + "\n")
    links = "\n".join(f"![{case.slug}](sheets/{case.slug}.png)\n" for case in cases)
    atomic_write(folder / "report.md", f"{markdown(report)}\n## Pictures of the first seed\n\n{links}")


def contact_sheet(case: Case, results: Sequence[Mapping[str, Any]], folder: Path) -> Image.Image:
    """The truth, then a row per method: input, content alone, style alone, both, mixed; the first picture of each.

    Scores count without their pictures; a method whose pictures were not kept has no row.
    """
    truths = [example.pictures[0] for example in (*case.targets, *case.others)]
    rows = [[case.picture, *truths, case.picture, case.mix]]
    heads = ["input", *(example.word for example in (*case.targets, *case.others)), "both", f"in {case.partner}"]
    names = ["truth"]
    for result in results:
        home = folder / "runs" / result["method"] / case.slug / f"seed-{result['seed']}"
        files = {(picture["task"], picture["target"]): picture["file"] for picture in reversed(result["pictures"])}
        shown = [home / file for file in reversed(files.values())]
        if result["method"] not in names and all(path.is_file() for path in shown):
            rows.append([case.picture, *(Image.open(path) for path in shown)])
            names.append(result["method"])
    side = ENLARGED * case.picture.width
    large = [[picture.resize((side, side), Image.Resampling.NEAREST) for picture in row] for row in rows]
    return sheet(large, names, heads)
