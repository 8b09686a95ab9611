"""Local scaling, worked out by hand on angles."""

import math

import pytest
import torch

from unziplora.metrics.csls import csls


def at(*degrees: float) -> torch.Tensor:
    """Unit vectors of the plane at these angles, so that cosines are those of their differences."""
    return torch.tensor([[math.cos(math.radians(angle)), math.sin(math.radians(angle))] for angle in degrees])


def test_two_nearest_references_of_each_side_are_subtracted():
    # x at 0°, y at 60°, references at 30°, 90° and 180°. cos(x, y) = 1/2.
    # r(x) = (cos 30° + cos 90°) / 2 = √3/4; r(y) = (cos 30° + cos 30°) / 2 = √3/2.
    value = csls(at(0), at(60), at(30, 90, 180), neighbors=2)
    assert value.tolist() == [[pytest.approx(1 - 3 * math.sqrt(3) / 4, abs=1e-6)]]


def test_fewer_references_than_neighbors_all_count():
    # r(x) = (cos 30° + cos 90° + cos 180°) / 3 = (√3/2 − 1) / 3; r(y) = (√3/2 + √3/2 − 1/2) / 3
    value = csls(at(0), at(60), at(30, 90, 180), neighbors=10)
    usual = ((math.sqrt(3) / 2 - 1) + (math.sqrt(3) - 0.5)) / 3
    assert value.tolist() == [[pytest.approx(1 - usual, abs=1e-6)]]


def test_rows_are_images_and_columns_truths():
    values = csls(at(0, 60), at(60, 0, 0), at(30))
    assert values.shape == (2, 3)
    assert values[0, 0] == values[1, 1] == pytest.approx(1 - math.sqrt(3), abs=1e-6)
    assert values[0, 1] == values[1, 0] == pytest.approx(2 - math.sqrt(3), abs=1e-6)
