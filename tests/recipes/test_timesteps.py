"""Timesteps of the base's training."""

from __future__ import annotations

import numpy as np

from recipes.base.draws import timesteps


def test_timesteps_without_shift_are_uniform() -> None:
    drawn = timesteps(20_000, 1.0, np.random.default_rng(0))
    assert (drawn.min(), drawn.max()) == (0, 999)
    counts, _ = np.histogram(drawn, 10, (0, 1000))
    assert counts.min() > 1800


def test_shift_of_two_moves_the_median_to_two_thirds() -> None:
    drawn = timesteps(20_000, 2.0, np.random.default_rng(0))
    assert (drawn.min(), drawn.max()) == (0, 999)
    assert abs(np.median(drawn) - 2000 / 3) < 10  # 2 · ½ / (1 + ½)
    even = timesteps(20_000, 1.0, np.random.default_rng(0)) / 1000
    assert np.allclose(drawn, 1000 * 2 * even / (1 + even), atol=2.1)


def test_timesteps_of_a_batch_are_spread_evenly_in_random_order() -> None:
    drawn = timesteps(10, 1.0, np.random.default_rng(0))
    assert sorted(drawn // 100) == list(range(10))
    assert list(drawn) != sorted(drawn)
