"""Arithmetic of the benchmark: from similarities to scores, to a scale, to one figure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import mean, stdev

from torch import Tensor

from unziplora.metrics.similarity import harmonic_mean, similarity

Figures = dict[str, float]
"""Figures by name, `task.quantity`, such as `content.score`."""

Comparison = Callable[[Tensor, Tensor], list[float]]
"""Function that returns the likeness of each image [N, D] to its truths [M, D], such as `similarity`."""

CONTENT, STYLE = "content.score", "style.score"
"""The two figures on the scale: content alone in other styles, style alone on other contents."""


def leak(features: Tensor, truths: Tensor, image: Tensor, compare: Comparison = similarity) -> list[float]:
    """Return by how much images [N, D] resemble the training image [1, D] more than their truths [M, D] do; N values.

    The features are those of style for the content alone, and those of content for the style alone.
    """
    expected = mean(compare(truths, image))
    return [value - expected for value in compare(features, image)]


def mean_figures(rows: Iterable[Mapping[str, float]]) -> Figures:
    """Return the mean of each figure over the rows that contain it."""
    rows = list(rows)
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: mean(row[name] for row in rows if name in row) for name in names}


def scale(value: float, base: float, oracle: float) -> float | None:
    """Scale a score: 0 is the base without LoRA, 1 the oracle; None if the oracle is no better than the base."""
    return (value - base) / (oracle - base) if oracle > base else None


def headline(figures: Mapping[str, float], base: Mapping[str, float], oracle: Mapping[str, float]) -> Figures:
    """Return scaled content, scaled style and their harmonic mean; empty if there is no scale.

    Args:
        figures: means over cases, of one method and one training seed.
        base: the same of the base without LoRA.
        oracle: the same of the oracle, means over its training seeds.
    """
    content, style = (scale(figures[name], base[name], oracle[name]) for name in (CONTENT, STYLE))
    if content is None or style is None:
        return {}
    return {"content.scaled": content, "style.scaled": style, "headline": harmonic_mean(content, style)}


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Return mean and standard deviation over training seeds; no deviation for a single one."""
    return mean(values), stdev(values) if len(values) > 1 else None
