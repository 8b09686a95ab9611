import pytest
import torch

from unziplora.metrics.similarity import geometric_mean, harmonic_mean, similarity


def test_similarity_is_the_mean_cosine_to_all_truths():
    made = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    truths = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert similarity(made, truths) == pytest.approx([0.5, 0.7])


def test_geometric_mean_is_0_if_one_half_is_negative():
    assert geometric_mean(0.9, 0.4) == pytest.approx(0.6)
    assert geometric_mean(0.8, 0.8) == pytest.approx(0.8)
    assert geometric_mean(1.0, -0.3) == 0.0
    assert geometric_mean(-0.5, -0.5) == 0.0


def test_harmonic_mean_needs_both_halves():
    assert harmonic_mean(0.5, 0.5) == pytest.approx(0.5)
    assert harmonic_mean(0.9, 0.1) == pytest.approx(0.18)
    assert harmonic_mean(1.0, -0.2) == 0.0
    assert harmonic_mean(-1.0, -1.0) == 0.0
