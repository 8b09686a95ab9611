import math

import pytest
import torch

from unziplora.errors import UserError
from unziplora.lora.blocks import BlockMap, read_blocks
from unziplora.probe.scores import (
    ALL,
    Row,
    Score,
    choose,
    judge,
    leans,
    movement,
    plain,
    score,
    score_rows,
    table,
    to_toml,
)


def row(content: float, style: float, error: float = 0.0) -> Row:
    return Row(
        content=Score(mean=content, error=error, pairs=4),
        style=Score(mean=style, error=error, pairs=4),
    )


# content: mean 0.3, deviation 0.2236; style: the same
ROWS = {
    "down_blocks.1.attentions.0": row(0.0, 0.0),
    "mid_block.attentions.0": row(0.3, 0.3),
    "up_blocks.0.attentions.0": row(0.6, 0.3),
    "up_blocks.0.attentions.1": row(0.3, 0.6),
}


class TestMovement:
    def test_is_the_share_of_the_two_distances(self):
        p, q = torch.tensor([0.0, 0.0]), torch.tensor([4.0, 0.0])
        x = torch.tensor([[0.0, 0.0], [4.0, 0.0], [1.0, 0.0], [0.0, 3.0], [2.0, 7.0]])
        # distances (to P, to Q): (0, 4), (4, 0), (1, 3), (3, 5), equal
        torch.testing.assert_close(movement(x, p, q), torch.tensor([0.0, 1.0, 0.25, 0.375, 0.5]))

    def test_says_nothing_where_the_two_references_are_the_same(self):
        p = torch.tensor([[0.6, 0.8], [0.6, 0.8]])
        q = torch.tensor([[0.6, 0.8], [0.8, 0.6]])
        found = movement(torch.tensor([[[0.6, 0.8], [0.8, 0.6]], [[1.0, 0.0], [0.6, 0.8]]]), p, q)
        assert found[:, 0].isnan().all()
        assert found[:, 1].tolist() == [1.0, 0.0]


class TestScore:
    def test_averages_the_seeds_of_a_pair_before_the_standard_error(self):
        found = score(torch.tensor([[0.1, 0.3], [0.4, 0.4], [0.5, 0.7]]))  # pairs: 0.2, 0.4, 0.6
        assert found is not None
        assert found.mean == pytest.approx(0.4)
        assert found.error == pytest.approx(0.2 / math.sqrt(3))
        assert found.pairs == 3

    def test_leaves_out_what_says_nothing(self):
        nan = math.nan
        found = score(torch.tensor([[0.1, nan], [nan, nan], [0.3, 0.3]]))
        assert found is not None
        assert (found.mean, found.pairs) == (pytest.approx(0.2), 2)
        assert score(torch.full((2, 2), nan)) is None

    def test_of_one_pair_has_no_error(self):
        found = score(torch.tensor([[0.1, 0.3]]))
        assert (found.mean, found.error, found.pairs) == (pytest.approx(0.2), None, 1)
        assert str(found) == "0.200"

    @pytest.mark.parametrize(
        ("mean", "error", "moves"), [(0.04, 0.0, False), (0.06, None, True), (0.1, 0.06, False), (0.1, 0.04, True)]
    )
    def test_moves_by_more_than_nothing_and_more_than_its_error(self, mean: float, error: float | None, moves: bool):
        assert Score(mean=mean, error=error, pairs=3).moves is moves


class TestMap:
    def test_leaning_is_the_difference_of_standardized_scores(self):
        found = leans({"a": row(0.6, 0.1), "b": row(0.2, 0.2), "c": row(0.4, 0.3)})
        unit = math.sqrt(1.5)  # of three evenly spaced values the outer ones lie √1.5 deviations from the mean
        assert found == pytest.approx({"a": 2 * unit, "b": -unit, "c": -unit})

    def test_scores_that_are_all_alike_lean_nowhere(self):
        assert leans({"a": row(0.2, 0.1), "b": row(0.2, 0.1)}) == {"a": 0.0, "b": 0.0}

    def test_blocks_go_where_they_lean_if_they_move_pictures(self):
        assert choose(ROWS, 2, 4) == BlockMap(("up_blocks.0.attentions.0",), ("up_blocks.0.attentions.1",))

    def test_the_clearest_come_first_and_no_more_than_asked_for(self):
        rows = {"a": row(0.5, 0.1), "b": row(0.4, 0.1), "c": row(0.1, 0.4), "d": row(0.1, 0.5), "e": row(0.1, 0.45)}
        assert choose(rows, 1, 2) == BlockMap(("a",), ("d", "e"))
        assert choose(rows, 9, 9) == BlockMap(("a", "b"), ("d", "e", "c"))
        assert choose(rows, 0, 0) == BlockMap((), ())

    def test_a_block_that_moves_nothing_is_in_no_map_wherever_it_leans(self):
        rows = {"a": row(0.04, 0.0), "b": row(0.0, 0.04), "c": row(0.01, 0.01)}
        assert choose(rows, 2, 2) == BlockMap((), ())
        unsure = {"a": row(0.5, 0.1, error=0.3), "b": row(0.1, 0.5, error=0.3)}
        assert choose(unsure, 2, 2) == BlockMap((), ())

    @pytest.mark.parametrize("counts", [(2, 4), (0, 0)])
    def test_is_written_as_the_methods_read_it(self, tmp_path, counts: tuple[int, int]):
        found = judge({**ROWS, ALL: row(0.9, 0.9)}, *counts, base="tiny-xl", measure="statistics")
        (tmp_path / "blocks.toml").write_text(to_toml(found))
        assert read_blocks(str(tmp_path / "blocks.toml")) == choose(ROWS, *counts)


def test_rows_come_from_the_movements_of_both_axes():
    content = torch.tensor([[[0.1], [0.3]], [[1.0], [1.0]]])  # [blocks + all, pairs, seeds]
    rows = score_rows(["a", ALL], {"content": content, "style": content / 2}, "tiny-xl")
    assert rows["a"].content.mean == pytest.approx(0.2)
    assert rows["a"].style.mean == pytest.approx(0.1)
    assert rows[ALL].style.mean == pytest.approx(0.5)
    with pytest.raises(UserError, match="tiny-xl draws the same pictures whatever the style words"):
        score_rows(["a", ALL], {"content": content, "style": content * math.nan}, "tiny-xl")


def test_table_shows_scores_leaning_and_map():
    text = table(judge({**ROWS, ALL: row(0.9, 0.8, error=0.02)}, 2, 4, base="tiny-xl", measure="statistics"))
    lines = {line.split()[0]: line.split() for line in text.splitlines() if "_block" in line}
    assert list(lines) == list(ROWS)
    assert lines["up_blocks.0.attentions.0"][1:] == ["0.600", "±", "0.000", "0.300", "±", "0.000", "+1.41", "content"]
    assert lines["up_blocks.0.attentions.1"][-2:] == ["-1.41", "style"]
    assert "0.900 ± 0.020" in text
    assert max(map(len, text.splitlines())) <= 100


def test_numbers_that_json_lacks_become_null():
    assert plain(torch.tensor([[[0.25, math.nan]]])) == [[[0.25, None]]]
