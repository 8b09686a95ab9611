"""Similarities of embedded images, and their means."""

from __future__ import annotations

import math

from torch import Tensor


def similarity(features: Tensor, truths: Tensor) -> list[float]:
    """Return the mean cosine of each image [N, D] to its truths [M, D], rows of unit length; N values."""
    return [float(value) for value in (features @ truths.T).mean(1)]


def geometric_mean(first: float, second: float) -> float:
    """Return the geometric mean of two similarities, each clipped at 0.

    It is a product, so that neither copying the image (right content, wrong style) nor ignoring the LoRA pays.
    """
    return math.sqrt(max(first, 0.0) * max(second, 0.0))


def harmonic_mean(content: float, style: float) -> float:
    """Return the harmonic mean of two scores; it is 0 if one of them is negative."""
    content, style = max(content, 0.0), max(style, 0.0)
    return 2 * content * style / (content + style) if content + style > 0 else 0.0
