"""Accuracy of a measure on drawings, concepts and styles: ``python -m recipes.base.identity_report TOML MEASURE``.

The tests use drawings and concepts that no network has seen, under filters that were trained on and under new ones.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from torch import Tensor

from recipes import run
from recipes.base.config import Recipe
from recipes.base.filters import FILTERS
from recipes.base.grades import Grade
from recipes.base.identity_data import open_world, render
from recipes.base.world import NEVER_FILTERS, Item, World, held_out_concepts
from unziplora.metrics.measures import WEIGHTS, CaseMeasure, Plain, Trained

UNSEEN = ("fxemoji", "noto-v1")
OTHERS = ("noto", "twemoji")
"""Known sets, whose drawings of the same concepts are distractors only."""
Embed = Callable[[Sequence[Image.Image]], Tensor]
Figures = dict[str, float]


@dataclass(frozen=True)
class Shown:
    """Image of a test: a drawing in one rendering of a filter."""

    concept: str
    drawing: str
    filter: str
    rendering: int

    @property
    def look(self) -> tuple[str, int]:
        """Style of the image; another rendering of the filter is another style."""
        return self.filter, self.rendering


class Trials:
    """Source of trials in one group of filters: a query, its target, then the wrong candidates."""

    def __init__(self, concepts: list[str], filters: Sequence[str], renderings: int, seed: int = 7):
        self.rng = np.random.default_rng(seed)
        self.concepts = concepts
        self.looks = [(f, r) for f in filters for r in range(renderings)]

    def pick(self, options: Sequence, count: int = 1, but: object = None) -> list:
        """Draw `count` of the options other than `but`."""
        left = [option for option in options if option != but]
        return [left[i] for i in self.rng.choice(len(left), min(count, len(left)), replace=False)]

    def content(self) -> list[Shown]:
        """Draw a trial of 16 drawings: three of the same concept from other sets, half of all in the query's style."""
        concept, drawing = self.pick(self.concepts)[0], self.pick(UNSEEN)[0]
        mine, other = self.pick(self.looks, 2)
        rivals = [(concept, d) for d in (*UNSEEN, *OTHERS) if d != drawing]
        rivals += [(c, self.pick(UNSEEN)[0]) for c in self.pick(self.concepts, 12, concept)]
        looks = [mine if n % 2 else other for n in range(len(rivals))]
        wrong = [Shown(c, d, *look) for (c, d), look in zip(rivals, looks, strict=True)]
        return [Shown(concept, drawing, *mine), Shown(concept, drawing, *other), *wrong]

    def concept(self) -> list[Shown]:
        """Draw a trial of 16 concepts, the target in another set and style, half of the others in the query's."""
        concept, drawing = self.pick(self.concepts)[0], self.pick(UNSEEN)[0]
        hand = self.pick(UNSEEN, but=drawing)[0]
        mine, other = self.pick(self.looks, 2)
        rivals = self.pick(self.concepts, 15, concept)
        wrong = [Shown(c, drawing, *mine) if n % 2 else Shown(c, hand, *other) for n, c in enumerate(rivals)]
        return [Shown(concept, drawing, *mine), Shown(concept, hand, *other), *wrong]

    def style(self) -> list[Shown]:
        """Draw a trial of 12 styles, the target on another drawing, half of the others on the query's."""
        first, second = self.pick(self.concepts, 2)
        a, b = self.pick(UNSEEN)[0], self.pick(UNSEEN)[0]
        mine = self.pick(self.looks)[0]
        near = [look for look in self.looks if look[0] == mine[0] and look != mine]
        far = self.pick([look for look in self.looks if look[0] != mine[0]], 11 - len(near))
        wrong = [Shown(first, a, *look) if n % 2 else Shown(second, b, *look) for n, look in enumerate(near + far)]
        return [Shown(first, a, *mine), Shown(second, b, *mine), *wrong]


def paint(world: World, shown: Shown) -> Image.Image:
    """Render an image of a test: rendering 0 is the filter as it is, each other one has its own grade."""
    rgb = _filtered(world, shown.concept, shown.drawing, shown.filter, shown.rendering)
    if shown.rendering == 0:
        return Image.fromarray(rgb)
    rng = np.random.default_rng((len(shown.filter), sum(shown.filter.encode()), shown.rendering))
    grade = Grade.draw(rng)
    place = np.random.default_rng(sum((shown.concept + shown.drawing).encode()))
    return Image.fromarray((grade.apply(rgb.astype(np.float32) / 255, place) * 255).round().astype(np.uint8))


@cache
def _filtered(world: World, concept: str, drawing: str, name: str, variant: int) -> np.ndarray:
    return render(world, Item(concept, drawing, name, name, variant + 100))


def auc(same: np.ndarray, different: np.ndarray) -> float:
    """Compute the chance that a same pair is more similar than a different one; ties count half."""
    every = np.sort(different)
    below, upto = np.searchsorted(every, same, "left"), np.searchsorted(every, same, "right")
    return float((below + upto).mean() / 2 / len(every))


def judge(embed: Embed, trials: list[list[Shown]], world: World) -> Figures:
    """Compute the share of trials whose target is the nearest candidate, and the AUC of same and different pairs."""
    where = {shown: n for n, shown in enumerate(dict.fromkeys(s for trial in trials for s in trial))}
    rows = embed([paint(world, shown) for shown in where]).numpy()
    similarities = [rows[[where[s] for s in trial[1:]]] @ rows[where[trial[0]]] for trial in trials]
    right = np.mean([similar[0] > similar[1:].max() for similar in similarities])
    same = np.array([similar[0] for similar in similarities])
    different = np.concatenate([similar[1:] for similar in similarities])
    return {"right": round(float(right), 3), "auc": round(auc(same, different), 3)}


def report(measure: CaseMeasure, recipe: Recipe, count: int) -> dict[str, dict[str, Figures]]:
    """Compute accuracies and AUCs of content, concept and style, under trained filters and under new ones."""
    world = open_world(recipe)
    concepts = [c for c in sorted(held_out_concepts()) if all(world.has(d, c) for d in (*UNSEEN, *OTHERS))]
    known = [name for name in FILTERS if name not in NEVER_FILTERS]
    groups = {
        "known filters": (Trials(concepts, known, 2), ("content", "concept", "style")),
        "unseen filters": (Trials(concepts, sorted(NEVER_FILTERS), 4), ("content", "concept", "style")),
        "all filters, one rendering each": (Trials(concepts, list(FILTERS), 1), ("style",)),
    }
    figures: dict[str, dict[str, Figures]] = {}
    for name, (trials, views) in groups.items():
        figures[name] = {}
        for view in views:
            queries = [getattr(trials, view)() for _ in range(count)]
            figures[name][view] = judge(getattr(measure, view), queries, world)
            print(measure.name, name, view, figures[name][view], flush=True)
    return figures


def main() -> None:
    """Test one measure and add its figures to report.json."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("measure", choices=["trained", "plain"])
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder of the trained networks")
    parser.add_argument("--name", help="under which to write, the measure's own name if left out")
    parser.add_argument("--count", type=int, default=150, help="trials of each kind")
    options = parser.parse_args()
    cv2.setNumThreads(1)
    measure = Trained(options.weights) if options.measure == "trained" else Plain()
    path = WEIGHTS / "report.json"
    every = json.loads(path.read_text()) if path.exists() else {}
    every[options.name or measure.name] = report(measure, Recipe.read(options.recipe), options.count)
    path.write_text(json.dumps(every, indent=2) + "\n")


if __name__ == "__main__":
    run(main)
