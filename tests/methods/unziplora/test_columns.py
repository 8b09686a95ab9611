"""Schedule, scores and choice of columns, compared with values by hand."""

import pytest
import torch

from unziplora.lora.layer import Branch
from unziplora.methods.unziplora.columns import ColumnSeparation, Scores, choose, columns_held, phase
from unziplora.training.loss import orthogonality


def mask(*bits: int) -> torch.Tensor:
    return torch.tensor(bits, dtype=torch.bool)


NONE = mask(0, 0, 0, 0, 0)


def test_schedule_of_the_paper():
    phases = [phase(step, 600, 3, 1) for step in range(600)]
    assert [step for step, p in enumerate(phases) if p.opens] == [0, 200, 400]
    assert [step for step, p in enumerate(phases) if p.warm] == [0, 200, 400]
    assert [step for step, p in enumerate(phases) if p.chooses] == [1, 201, 401]
    assert [p.period for p in phases] == [0] * 200 + [1] * 200 + [2] * 200
    assert [columns_held(640, 0.3, period, 3) for period in range(3)] == [64, 128, 192]


def test_schedule_gives_the_remainder_to_the_last_period():
    phases = [phase(step, 11, 3, 2) for step in range(11)]
    assert [p.period for p in phases] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2]
    assert [step for step, p in enumerate(phases) if p.opens] == [0, 3, 6]
    assert [step for step, p in enumerate(phases) if p.chooses] == [2, 5, 8]
    assert [step for step, p in enumerate(phases) if p.warm] == [0, 1, 3, 4, 6, 7]


def test_scores_match_values_by_hand():
    delta = torch.tensor([[1.0, -2.0], [0.5, 0.0]])
    first = torch.tensor([[3.0, 1.0], [4.0, 9.0]])
    second = torch.tensor([[-1.0, 0.0], [0.0, 9.0]])
    importance = Scores()
    importance(first, delta)
    importance(second, delta)
    # |C| of the first: [[3, 2], [2, 0]], of the second: [[1, 0], [0, 0]]; row means added up
    assert importance.total.tolist() == [2.5 + 0.5, 1.0 + 0.0]
    threshold = Scores(official_code=True)
    threshold(first, delta)
    threshold(second, delta)
    assert threshold.total.tolist() == [1.0 + 0.5, 0.5 + 0.0]


def test_threshold_scores_do_not_depend_on_a_known_loss_scale():
    gradient, delta = torch.full((4, 8), 3e-6), torch.ones(4, 8)
    scaled, unscaled = Scores(official_code=True, gradient_scale=2.0**16), Scores(official_code=True)
    scaled(gradient * 2.0**16, delta)
    unscaled(gradient * 2.0**16, delta)
    assert scaled.total.tolist() == [0.0] * 4
    assert unscaled.total.tolist() == [1.0] * 4  # the official code in fp16


def test_overflowing_gradients_do_not_affect_other_columns():
    scores = Scores()
    scores(torch.tensor([[torch.inf, 1.0], [2.0, 1.0], [torch.nan, 0.0]]), torch.ones(3, 2))
    assert scores.total.tolist() == [0.5, 1.5, 0.0]


def test_choice_takes_the_best_columns_and_keeps_held_ones():
    scores = torch.tensor([0.5, 0.1, 0.9, 0.3, 0.7])
    first = choose(scores, NONE, NONE, 2)
    assert first.tolist() == mask(0, 0, 1, 0, 1).tolist()
    turned = torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0])
    assert choose(turned, first, NONE, 3).tolist() == mask(0, 1, 1, 0, 1).tolist()
    assert choose(turned, first, NONE, 2).tolist() == first.tolist()


def test_ties_go_to_the_lower_index_and_exactly_k_are_chosen():
    assert choose(torch.ones(5), NONE, NONE, 2).tolist() == mask(1, 1, 0, 0, 0).tolist()
    assert choose(torch.zeros(5), mask(1, 0, 0, 0, 0), NONE, 3).tolist() == mask(1, 1, 1, 0, 0).tolist()
    many = torch.zeros(1280, dtype=torch.bool)
    assert int(choose(torch.ones(1280), many, many, 128).sum()) == 128


def test_official_choice_chooses_none_if_all_tie():
    assert int(choose(torch.ones(5), NONE, NONE, 2, official_code=True).sum()) == 0
    scores = torch.tensor([0.5, 0.1, 0.9, 0.3, 0.7])
    assert choose(scores, NONE, NONE, 3, official_code=True).tolist() == mask(0, 0, 1, 0, 1).tolist()
    assert choose(scores, NONE, NONE, 0, official_code=True).tolist() == NONE.tolist()


def test_official_choice_ranks_held_columns_and_never_takes_closed_ones():
    scores = torch.tensor([0.5, 0.1, 0.9, 0.3, 0.7])
    assert choose(scores, mask(0, 0, 1, 0, 1), NONE, 2, official_code=True).tolist() == mask(0, 0, 1, 0, 1).tolist()
    assert choose(scores, mask(0, 1, 0, 0, 0), NONE, 2, official_code=True).tolist() == mask(0, 1, 1, 0, 0).tolist()
    assert choose(scores, NONE, mask(0, 0, 1, 1, 1), 4, official_code=True).tolist() == mask(1, 1, 0, 0, 0).tolist()


def test_closed_columns_are_taken_last():
    scores = torch.tensor([0.5, 0.1, 0.9, 0.3, 0.7])
    closed = mask(0, 0, 1, 0, 1)
    assert choose(scores, NONE, closed, 2).tolist() == mask(1, 0, 0, 1, 0).tolist()
    assert choose(scores, NONE, closed, 4).tolist() == mask(1, 1, 1, 1, 0).tolist()


def test_orthogonality_matches_the_value_by_hand():
    ones = torch.ones(4)
    layers = [
        (torch.tensor([1.0, 0.5, 0.0, 1.0]), torch.tensor([0.0, 0.5, 1.0, 1.0])),  # mean(0, .25, 0, 1)
        (ones[:2], ones[:2] * 0.25),
    ]
    assert orthogonality(layers).item() == pytest.approx((1.25 / 4 + 0.25) / 2)


@pytest.mark.parametrize("official_code", [False, True])
def test_closed_columns_are_reset_except_as_in_the_official_code(official_code: bool):
    up = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    branches = {name: {"q": Branch(torch.ones(2, 4), up.clone())} for name in ("content", "style")}
    columns = ColumnSeparation(branches, {"q": None}, official_code)
    columns.held["content"]["q"], columns.held["style"]["q"] = mask(1, 0, 1), mask(0, 0, 1)
    columns.close()
    for name, rows in (("content", [[1, 2], [0, 0], [5, 6]]), ("style", [[0, 0], [0, 0], [5, 6]])):
        branch = branches[name]["q"]
        assert branch.up.tolist() == (up.tolist() if official_code else rows)
        assert branch.delta().any(1).tolist() == columns.held[name]["q"].tolist(), "closed columns have no effect"
