"""Check that content and style came apart. It needs no truth, only the image that the two LoRAs learned from.

Each LoRA draws alone. Its images are compared with the learned image, and with those that the base draws without any
LoRA for the same words and seeds. A good content LoRA draws the learned subject and leaves the style to the words; a
good style LoRA draws in the learned style and leaves the subject to the words.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import mean
from typing import NamedTuple

from torch import Tensor

from unziplora.metrics.measures import CaseMeasure
from unziplora.metrics.similarity import geometric_mean, harmonic_mean, similarity
from unziplora.metrics.statistics import Images

Embed = Callable[[Images], Tensor]


class Alone(NamedTuple):
    """Images of one LoRA alone, and images of the base for the same words and seeds, in the same order."""

    made: Images
    plain: Images


@dataclass(frozen=True)
class Part:
    """Figures of one LoRA alone: cosines, means over its images.

    Attributes:
        learned: likeness to the learned image in what the LoRA is for.
        learned_before: the same of the base's images.
        leaked: likeness to the learned image in what belongs to the other LoRA.
        leaked_before: the same of the base's images.
        obeyed: likeness to the base's images in what the words ask for.
    """

    learned: float
    learned_before: float
    leaked: float
    leaked_before: float
    obeyed: float

    @property
    def gain(self) -> float:
        """Share of what the base lacks that the LoRA adds: 0 nothing, 1 all."""
        return (self.learned - self.learned_before) / max(1 - self.learned_before, 1e-6)

    @property
    def leak(self) -> float:
        """The same share of what belongs to the other LoRA, which should not come along."""
        return (self.leaked - self.leaked_before) / max(1 - self.leaked_before, 1e-6)

    @property
    def score(self) -> float:
        """0…1: neither copying the learned image nor ignoring the LoRA pays."""
        return geometric_mean(self.learned, self.obeyed)


@dataclass(frozen=True)
class Separation:
    """Figures of the content LoRA and of the style LoRA."""

    content: Part
    style: Part

    @property
    def score(self) -> float:
        """Harmonic mean of both scores, 0…1."""
        return harmonic_mean(self.content.score, self.style.score)


def measure_separation(measure: CaseMeasure, learned: Images, content: Alone, style: Alone) -> Separation:
    """Compare the images of both LoRAs alone with the learned images and with those of the base."""
    return Separation(
        _part(content, learned, measure.content, measure.style, measure.style),
        _part(style, learned, measure.style, measure.content, measure.concept),
    )


def _part(images: Alone, learned: Images, own: Embed, other: Embed, asked: Embed) -> Part:
    """Compute the figures of one LoRA.

    Args:
        own, other: embed what the LoRA is for, and what belongs to the other one.
        asked: embeds what the words ask for.
    """

    def likeness(embed: Embed) -> tuple[float, float]:
        """Return the likeness to the learned images, of the LoRA's images and of the base's."""
        known = embed(learned)
        return mean(similarity(embed(images.made), known)), mean(similarity(embed(images.plain), known))

    (learns, learned_before), (leaked, leaked_before) = likeness(own), likeness(other)
    obeyed = float((asked(images.made) * asked(images.plain)).sum(1).mean())
    return Part(learns, learned_before, leaked, leaked_before, obeyed)
