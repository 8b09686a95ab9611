"""The check of a split against values worked out by hand, on images that are embedded as given."""

import math

import pytest
import torch
from torch import Tensor

from unziplora.metrics.separation import Alone, measure_separation


class Planes:
    """A measure whose images are three angles: content, style and kind of thing, each embedded on a circle."""

    name = "planes"

    def _embed(self, images: list[tuple[float, float, float]], place: int) -> Tensor:
        angles = torch.tensor([image[place] for image in images])
        return torch.stack([angles.cos(), angles.sin()], dim=1)

    def content(self, images: list[tuple[float, float, float]]) -> Tensor:
        return self._embed(images, 0)

    def style(self, images: list[tuple[float, float, float]]) -> Tensor:
        return self._embed(images, 1)

    def concept(self, images: list[tuple[float, float, float]]) -> Tensor:
        return self._embed(images, 2)


RIGHT, THIRD = math.pi / 2, math.pi / 3
LEARNED = (0.0, 0.0, 0.0)


def test_parts_are_the_cosines_by_hand():
    content = Alone(made=[(THIRD, RIGHT, 0.0)], plain=[(RIGHT, RIGHT, 0.0)])
    style = Alone(made=[(RIGHT, THIRD, RIGHT)], plain=[(RIGHT, RIGHT, RIGHT)])
    found = measure_separation(Planes(), [LEARNED], content, style)
    for part in (found.content, found.style):
        assert part.learned == pytest.approx(0.5, abs=1e-6)
        assert part.learned_before == pytest.approx(0, abs=1e-6)
        assert part.leaked == part.leaked_before == pytest.approx(0, abs=1e-6)
        assert part.obeyed == pytest.approx(1)
        assert part.gain == pytest.approx(0.5, abs=1e-6)
        assert part.leak == pytest.approx(0, abs=1e-6)
        assert part.score == pytest.approx(math.sqrt(0.5), abs=1e-6)
    assert found.score == pytest.approx(math.sqrt(0.5), abs=1e-6)


def test_neither_copies_nor_untrained_loras_score():
    other = (RIGHT, RIGHT, RIGHT)
    copies = measure_separation(Planes(), [LEARNED], Alone([LEARNED], [other]), Alone([LEARNED], [other]))
    assert copies.score == pytest.approx(0, abs=1e-3)
    assert copies.content.gain == copies.content.leak == pytest.approx(1, abs=1e-6)
    untrained = measure_separation(Planes(), [LEARNED], Alone([other], [other]), Alone([other], [other]))
    assert untrained.score == pytest.approx(0, abs=1e-3)
    assert untrained.style.gain == untrained.style.leak == pytest.approx(0, abs=1e-6)


def test_words_are_obeyed_where_both_images_of_a_pair_agree():
    made = [(0.0, 0.0, 0.0), (0.0, RIGHT, 0.0)]
    found = measure_separation(Planes(), [LEARNED], Alone(made, made[::-1]), Alone(made, made))
    assert found.content.obeyed == pytest.approx(0, abs=1e-6)
    assert found.style.obeyed == pytest.approx(1)
    assert found.content.learned == pytest.approx(1)
    assert found.content.leaked == found.content.leaked_before == pytest.approx(0.5, abs=1e-6)
