import math

import pytest
import torch

from unziplora.bench.scores import headline, leak, mean_and_deviation, mean_figures, scale


def test_leak_exceeds_the_similarity_of_truth_and_image():
    image = torch.tensor([[1.0, 0.0]])
    truths = torch.tensor([[0.6, 0.8], [0.0, 1.0]])  # 0.3 on average
    made = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    assert leak(made, truths, image) == pytest.approx([0.7, 0.3, -0.3])


def test_means_are_over_the_rows_that_have_a_figure():
    assert mean_figures([{"a": 1.0, "b": 2.0}, {"a": 3.0}]) == {"a": 2.0, "b": 2.0}


def test_scale_is_0_at_the_base_and_1_at_the_oracle():
    assert scale(0.2, 0.2, 0.6) == 0.0
    assert scale(0.6, 0.2, 0.6) == 1.0
    assert scale(0.3, 0.2, 0.6) == pytest.approx(0.25)
    assert scale(0.1, 0.2, 0.6) == pytest.approx(-0.25)
    assert scale(0.5, 0.4, 0.4) is None


def test_headline_scales_means_and_then_takes_the_harmonic_mean():
    base, oracle = {"content.score": 0.2, "style.score": 0.1}, {"content.score": 0.6, "style.score": 0.5}
    made = headline({"content.score": 0.3, "style.score": 0.4}, base, oracle)
    assert made == pytest.approx({"content.scaled": 0.25, "style.scaled": 0.75, "headline": 0.375})
    assert headline(base, base, oracle)["headline"] == 0.0
    assert headline(oracle, base, oracle)["headline"] == 1.0
    assert headline(base, base, base) == {}


def test_spread_is_the_deviation_over_seeds():
    assert mean_and_deviation([0.1, 0.3]) == (pytest.approx(0.2), pytest.approx(math.sqrt(0.02)))
    assert mean_and_deviation([0.4]) == (0.4, None)
