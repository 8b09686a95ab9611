"""The arithmetic of the benchmark: similarities to scores, scores to a scale, a scale to one figure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import mean, stdev

from torch import Tensor

Figures = dict[str, float]
"""Figures by name, such as `content.score`: task, dot, what was measured."""

CONTENT, STYLE = "content.score", "style.score"
"""The two figures that are scaled: content alone in other styles, style alone on other contents."""


def similarity(made: Tensor, truths: Tensor) -> list[float]:
    """Mean cosine of each picture [N, D] to its truths [M, D], rows of unit length; N values."""
    return [float(value) for value in (made @ truths.T).mean(1)]


def product(first: float, second: float) -> float:
    """The geometric mean of two similarities, each clipped at 0.

    A product: neither copying the picture (right content, wrong style) nor ignoring the LoRA pays.
    """
    return math.sqrt(max(first, 0.0) * max(second, 0.0))


def leak(made: Tensor, truths: Tensor, picture: Tensor) -> list[float]:
    """How much more pictures [N, D] resemble the training picture [1, D] than their truths [M, D] do; N values.

    In style features where the content alone was asked for, in content features where the style alone was.
    """
    own = float((truths @ picture.T).mean())
    return [value - own for value in similarity(made, picture)]


def mean_figures(rows: Iterable[Mapping[str, float]]) -> Figures:
    """The mean of each figure over the rows that have it."""
    kept = list(rows)
    names = dict.fromkeys(name for row in kept for name in row)
    return {name: mean(row[name] for row in kept if name in row) for name in names}


def scaled(value: float, base: float, oracle: float) -> float | None:
    """A score on the scale from 0 (the base without LoRA) to 1 (the oracle); None where the oracle is no better."""
    return (value - base) / (oracle - base) if oracle > base else None


def harmonic(content: float, style: float) -> float:
    """The harmonic mean of two scaled scores; a negative one counts 0, and then so does the mean."""
    content, style = max(content, 0.0), max(style, 0.0)
    return 2 * content * style / (content + style) if content + style > 0 else 0.0


def headline(figures: Mapping[str, float], base: Mapping[str, float], oracle: Mapping[str, float]) -> Figures:
    """Scaled content, scaled style and their harmonic mean, from means over cases; empty where the scale is.

    Args:
        figures: of one method and one training seed.
        base: of the base without LoRA.
        oracle: of the oracle, the mean over its training seeds.
    """
    content, style = (scaled(figures[name], base[name], oracle[name]) for name in (CONTENT, STYLE))
    if content is None or style is None:
        return {}
    return {"content.scaled": content, "style.scaled": style, "headline": harmonic(content, style)}


def spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard deviation over training seeds; no deviation for a single one."""
    return mean(values), stdev(values) if len(values) > 1 else None
