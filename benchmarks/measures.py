"""Check of the benchmark's measures on images that no training made: `python benchmarks/measures.py`.

A useful measure gives the truth, rendered again, nearly 1, and gives little to the results of bad methods: a copy of
the input, another drawing, the right thing in the wrong style. Figures are means over all cases of both splits.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from statistics import mean
from typing import Literal

from PIL import Image

from unziplora.bench.cases import Case, Example, load_cases
from unziplora.bench.evaluate import Task, score_images
from unziplora.bench.session import MEASURES
from unziplora.metrics.measures import CaseMeasure
from unziplora.models.text import Prompts

Control = tuple[str, Literal["content", "style"], Example, Image.Image]


def controls(case: Case, cases: dict[str, Case]) -> Iterator[Control]:
    """List comparisons on one case: name, kind of task, truth, and the image in place of a result."""
    strangers = [other for other in cases.values() if other.drawing != case.drawing]
    for truth in case.targets:
        for again in case.oracle_content:
            if again.word == truth.word:
                yield "1: D rendered again in the style asked for", "content", truth, again.images[0]
        yield "1: a copy of f(D)", "content", truth, case.image
        for other in strangers:
            for wrong in other.targets:
                if wrong.word == truth.word:
                    yield "1: another drawing in the style asked for", "content", truth, wrong.images[0]
    for truth in case.others:
        yield "2: one of two truths itself", "style", truth, truth.images[0]
        yield "2: a copy of f(D)", "style", truth, case.image
        for other in strangers:
            for wrong in other.others:
                if wrong.word == truth.word and other.filter != case.filter:
                    yield "2: the right thing under another filter", "style", truth, wrong.images[0]


def rows(measure: CaseMeasure) -> dict[str, float]:
    """Return the mean score of each kind of image."""
    scores: dict[str, list[float]] = {}
    for split in ("dev", "test"):
        cases = load_cases(split)
        for case in cases.values():
            for name, kind, truth, image in controls(case, cases):
                task = Task(kind, truth.word, Prompts("-"), {}, truth.images)
                scores.setdefault(name, []).append(score_images(measure, case, task, [image])[0]["score"])
    return {name: mean(values) for name, values in scores.items()}


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measures", nargs="+", default=["trained", "plain"], choices=list(MEASURES))
    names = parser.parse_args().measures
    columns = [rows(MEASURES[name]()) for name in names]
    print("| images | " + " | ".join(f"`{name}`" for name in names) + " |")
    print("|---" * (len(names) + 1) + "|")
    for name in columns[0]:
        print(f"| {name} | " + " | ".join(f"{column[name]:.2f}" for column in columns) + " |")


if __name__ == "__main__":
    main()
