"""What the benchmark's measures make of pictures that no training made: `python benchmarks/measures.py`.

A measure is of use if it gives the truth drawn anew nearly 1, and little to what a bad method makes: a copy of the
input, another drawing, the right thing in the wrong style. Means over all cases of both splits.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from statistics import mean
from typing import Literal

from PIL import Image

from unziplora.bench.cases import Case, Example, load_cases
from unziplora.bench.evaluate import Ask, score
from unziplora.bench.session import MEASURES
from unziplora.metrics.measures import Measure
from unziplora.models.text import Prompts

Control = tuple[str, Literal["content", "style"], Example, Image.Image]


def controls(case: Case, cases: dict[str, Case]) -> Iterator[Control]:
    """What to compare on one case: its name, the task, the truth, and the picture that stands for a made one."""
    strangers = [other for other in cases.values() if other.drawing != case.drawing]
    for truth in case.targets:
        for anew in case.oracle_content:
            if anew.word == truth.word:
                yield "1: D drawn anew in the style asked for", "content", truth, anew.pictures[0]
        yield "1: a copy of f(D)", "content", truth, case.picture
        for other in strangers:
            for wrong in other.targets:
                if wrong.word == truth.word:
                    yield "1: another drawing in the style asked for", "content", truth, wrong.pictures[0]
    for truth in case.others:
        yield "2: one of two truths itself", "style", truth, truth.pictures[0]
        yield "2: a copy of f(D)", "style", truth, case.picture
        for other in strangers:
            for wrong in other.others:
                if wrong.word == truth.word and other.filter != case.filter:
                    yield "2: the right thing under another filter", "style", truth, wrong.pictures[0]


def rows(measure: Measure) -> dict[str, float]:
    """The mean score of each kind of picture."""
    found: dict[str, list[float]] = {}
    for split in ("dev", "test"):
        cases = load_cases(split)
        for case in cases.values():
            for name, task, truth, made in controls(case, cases):
                ask = Ask(task, truth.word, Prompts("-"), {}, truth.pictures)
                found.setdefault(name, []).append(score(measure, case, ask, [made])[0]["score"])
    return {name: mean(values) for name, values in found.items()}


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measures", nargs="+", default=["trained", "plain"], choices=list(MEASURES))
    names = parser.parse_args().measures
    columns = [rows(MEASURES[name]()) for name in names]
    print("| pictures | " + " | ".join(f"`{name}`" for name in names) + " |")
    print("|---" * (len(names) + 1) + "|")
    for name in columns[0]:
        print(f"| {name} | " + " | ".join(f"{column[name]:.2f}" for column in columns) + " |")


if __name__ == "__main__":
    main()
