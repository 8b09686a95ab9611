"""Report of a benchmark: report.json, report.md, and a contact sheet of every case."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import BaseModel

from unziplora.bench.cases import Case
from unziplora.bench.scores import CONTENT, STYLE, Figures, headline, mean_and_deviation, mean_figures
from unziplora.config.bench import ABLATION, BenchConfig
from unziplora.images.sheet import sheet
from unziplora.utils.files import atomic_write, write_png
from unziplora.utils.text import table

ENLARGED = 2
"""Factor by which contact sheets enlarge images, so that labels are readable."""

COLUMNS = {
    "headline": "score",
    "content.scaled": "content",
    "style.scaled": "style",
    "both.score": "together",
    "mix.score": "mixed",
    "content.leak": "style leak",
    "style.leak": "content leak",
}
UNSCALED = {
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
- together: both LoRAs, compared with the training image; mixed: the content in the style of the partner case, compared
  with the image of exactly that. Neither is scaled.
- style leak, content leak: by how much the content alone resembles the training image's style, and the style alone its
  drawing, more than the truth does; 0 is none.
- ± is the standard deviation over training seeds.
"""


class Row(BaseModel):
    """Figures of one method by one measure: by training seed, means over cases, and the other way round."""

    method: str
    measure: str
    seeds: dict[int, Figures]
    cases: dict[str, Figures]

    def formatted(self, name: str) -> str:
        """Return a figure as mean ± deviation over training seeds, or a dash."""
        values = [figures[name] for figures in self.seeds.values() if name in figures]
        if not values:
            return "–"
        middle, deviation = mean_and_deviation(values)
        return f"{middle:.3f}" + (f" ± {deviation:.3f}" if deviation is not None else "")


class Report(BaseModel):
    """All results: a row per method and measure. The headline uses the first measure."""

    config: dict[str, Any]
    version: str
    measures: list[str]
    rows: list[Row]

    def __str__(self) -> str:
        return markdown_table(self.of(self.measures[0]), COLUMNS)

    def of(self, measure: str) -> list[Row]:
        """Return the rows of one measure."""
        return [row for row in self.rows if row.measure == measure]


def summarize(config: BenchConfig, results: Sequence[Mapping[str, Any]], measures: Sequence[str]) -> Report:
    """Average the results of `evaluate` over images, then over cases, then scale."""
    methods = list(dict.fromkeys(result["method"] for result in results))
    rows = [_row(method, measure, results) for measure in measures for method in methods]
    for measure in measures:
        ends = {row.method: mean_figures(row.seeds.values()) for row in rows if row.measure == measure}
        for row in rows:
            if row.measure == measure and ends.keys() >= {"base", "oracle"}:
                for figures in row.seeds.values():
                    figures.update(headline(figures, ends["base"], ends["oracle"]))
    settings = config.model_dump(mode="json", exclude={"out"})
    return Report(config=settings, version=version("unziplora"), measures=list(measures), rows=rows)


def _row(method: str, measure: str, results: Sequence[Mapping[str, Any]]) -> Row:
    own = [result for result in results if result["method"] == method]
    means = [(result["seed"], result["case"], image_means(result, measure)) for result in own]
    seeds, cases = (list(dict.fromkeys(result[key] for result in own)) for key in ("seed", "case"))
    return Row(
        method=method,
        measure=measure,
        seeds={seed: mean_figures(figures for other, _, figures in means if other == seed) for seed in seeds},
        cases={case: mean_figures(figures for _, other, figures in means if other == case) for case in cases},
    )


def image_means(result: Mapping[str, Any], measure: str) -> Figures:
    """Average over the images of each task of one result; figures are named `task.quantity`."""
    rows = [
        {f"{image['task']}.{name}": value for name, value in image["values"][measure].items()}
        for image in result["pictures"]
    ]
    return mean_figures(rows)


def markdown_table(rows: Sequence[Row], columns: Mapping[str, str]) -> str:
    """Format methods × figures as a Markdown table."""
    return table(("method", *columns.values()), [(row.method, *map(row.formatted, columns)) for row in rows])


def format_report(report: Report) -> str:
    """Format the whole report as Markdown."""
    config, first = report.config, report.of(report.measures[0])
    seeds = ", ".join(str(seed) for seed in dict.fromkeys(seed for row in first for seed in row.seeds))
    cases = len({case for row in first for case in row.cases})
    parts = [
        f"# Benchmark, {config['split']} cases\n",
        f"unziplora {report.version}, base {config['base']}, {cases} cases, training seeds {seeds}, "
        f"{config['samples']} images per prompt; measured by {report.measures[0]}.\n",
        markdown_table(first, COLUMNS) + "\n",
        LEGEND,
    ]
    ablation = [row for name in ABLATION for row in first if row.method == name]
    if len(ablation) > 1:
        parts.append("## Ablation: one separation more in each row\n\n" + markdown_table(ablation, COLUMNS) + "\n")
    for measure in report.measures:
        columns = {**dict(list(COLUMNS.items())[:3]), **UNSCALED}
        parts.append(f"## Measured by {measure}, not scaled\n\n" + markdown_table(report.of(measure), columns) + "\n")
    parts += ["## Per case: content score / style score, not scaled\n", _case_table(first), ""]
    return "\n".join(parts)


def _case_table(rows: Sequence[Row]) -> str:
    def cell(figures: Figures | None) -> str:
        return f"{figures[CONTENT]:.2f} / {figures[STYLE]:.2f}" if figures else "–"

    cases = dict.fromkeys(case for row in rows for case in row.cases)
    lines = [(case, *(cell(row.cases.get(case)) for row in rows)) for case in cases]
    return table(("case", *(row.method for row in rows)), lines)


def write_report(report: Report, results: Sequence[Mapping[str, Any]], cases: Sequence[Case], folder: Path) -> None:
    """Write the contact sheets, report.json and report.md.

    Raises:
        MachineError: disk full, no permission.
    """
    for case in cases:
        own = [result for result in results if result["case"] == case.slug]
        write_png(folder / "sheets" / f"{case.slug}.png", contact_sheet(case, own, folder))
    atomic_write(folder / "report.json", report.model_dump_json(indent=1) + "\n")
    links = "\n".join(f"![{case.slug}](sheets/{case.slug}.png)\n" for case in cases)
    atomic_write(folder / "report.md", f"{format_report(report)}\n## Images of the first seed\n\n{links}")


def first_images(result: Mapping[str, Any]) -> dict[tuple[str, str], str]:
    """Return the file of the first image of each task of one result, by the task's kind and target."""
    files: dict[tuple[str, str], str] = {}
    for image in result["pictures"]:
        files.setdefault((image["task"], image["target"]), image["file"])
    return files


def contact_sheet(case: Case, results: Sequence[Mapping[str, Any]], folder: Path) -> Image.Image:
    """Lay out the truth and one row per method, with the first image of each task.

    Columns: input, content alone, style alone, both, mixed. A method whose images were deleted has no row.
    """
    truths = [example.images[0] for example in (*case.targets, *case.others)]
    rows = [[case.image, *truths, case.image, case.mix]]
    columns = ["input", *(example.word for example in (*case.targets, *case.others)), "both", f"in {case.partner}"]
    names = ["truth"]
    for result in results:
        run = folder / "runs" / result["method"] / case.slug / f"seed-{result['seed']}"
        paths = [run / file for file in first_images(result).values()]
        if result["method"] not in names and all(path.is_file() for path in paths):
            rows.append([case.image, *(Image.open(path) for path in paths)])
            names.append(result["method"])
    side = ENLARGED * case.image.width
    enlarged = [[image.resize((side, side), Image.Resampling.NEAREST) for image in row] for row in rows]
    return sheet(enlarged, names, columns)
