import math

import pytest
import torch

from unziplora.errors import UserError
from unziplora.lora.blocks import BlockMap, read_blocks
from unziplora.probe.scores import (
    ALL,
    BlockScores,
    Score,
    format_findings,
    judge,
    leanings,
    make_block_map,
    movement,
    score,
    score_rows,
    to_lists,
    to_toml,
)


def row(content: float, style: float, error: float = 0.0) -> BlockScores:
    return BlockScores(
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
    def test_movement_is_the_share_of_the_two_distances(self):
        p, q = torch.tensor([0.0, 0.0]), torch.tensor([4.0, 0.0])
        x = torch.tensor([[0.0, 0.0], [4.0, 0.0], [1.0, 0.0], [0.0, 3.0], [2.0, 7.0]])
        # distances (to P, to Q): (0, 4), (4, 0), (1, 3), (3, 5), equal
        torch.testing.assert_close(movement(x, p, q), torch.tensor([0.0, 1.0, 0.25, 0.375, 0.5]))

    def test_movement_is_nan_if_the_references_are_equal(self):
        p = torch.tensor([[0.6, 0.8], [0.6, 0.8]])
        q = torch.tensor([[0.6, 0.8], [0.8, 0.6]])
        result = movement(torch.tensor([[[0.6, 0.8], [0.8, 0.6]], [[1.0, 0.0], [0.6, 0.8]]]), p, q)
        assert result[:, 0].isnan().all()
        assert result[:, 1].tolist() == [1.0, 0.0]


class TestScore:
    def test_seeds_of_a_pair_are_averaged_before_the_standard_error(self):
        result = score(torch.tensor([[0.1, 0.3], [0.4, 0.4], [0.5, 0.7]]))  # pairs: 0.2, 0.4, 0.6
        assert result is not None
        assert result.mean == pytest.approx(0.4)
        assert result.error == pytest.approx(0.2 / math.sqrt(3))
        assert result.pairs == 3

    def test_nan_movements_are_ignored(self):
        nan = math.nan
        result = score(torch.tensor([[0.1, nan], [nan, nan], [0.3, 0.3]]))
        assert result is not None
        assert (result.mean, result.pairs) == (pytest.approx(0.2), 2)
        assert score(torch.full((2, 2), nan)) is None

    def test_score_of_one_pair_has_no_error(self):
        result = score(torch.tensor([[0.1, 0.3]]))
        assert (result.mean, result.error, result.pairs) == (pytest.approx(0.2), None, 1)
        assert str(result) == "0.200"

    @pytest.mark.parametrize(
        ("mean", "error", "moves"), [(0.04, 0.0, False), (0.06, None, True), (0.1, 0.06, False), (0.1, 0.04, True)]
    )
    def test_movement_exceeds_the_threshold_and_twice_its_error(self, mean: float, error: float | None, moves: bool):
        assert Score(mean=mean, error=error, pairs=3).moves is moves


class TestMap:
    def test_leaning_is_the_difference_of_standardized_scores(self):
        result = leanings({"a": row(0.6, 0.1), "b": row(0.2, 0.2), "c": row(0.4, 0.3)})
        unit = math.sqrt(1.5)  # of three evenly spaced values the outer ones lie √1.5 deviations from the mean
        assert result == pytest.approx({"a": 2 * unit, "b": -unit, "c": -unit})

    def test_equal_scores_do_not_lean(self):
        assert leanings({"a": row(0.2, 0.1), "b": row(0.2, 0.1)}) == {"a": 0.0, "b": 0.0}

    def test_map_contains_blocks_that_lean_and_move_images(self):
        assert make_block_map(ROWS, 2, 4) == BlockMap(("up_blocks.0.attentions.0",), ("up_blocks.0.attentions.1",))

    def test_map_starts_with_the_clearest_blocks_and_is_limited(self):
        rows = {"a": row(0.5, 0.1), "b": row(0.4, 0.1), "c": row(0.1, 0.4), "d": row(0.1, 0.5), "e": row(0.1, 0.45)}
        assert make_block_map(rows, 1, 2) == BlockMap(("a",), ("d", "e"))
        assert make_block_map(rows, 9, 9) == BlockMap(("a", "b"), ("d", "e", "c"))
        assert make_block_map(rows, 0, 0) == BlockMap((), ())

    def test_block_that_moves_nothing_is_in_no_map(self):
        rows = {"a": row(0.04, 0.0), "b": row(0.0, 0.04), "c": row(0.01, 0.01)}
        assert make_block_map(rows, 2, 2) == BlockMap((), ())
        unsure = {"a": row(0.5, 0.1, error=0.3), "b": row(0.1, 0.5, error=0.3)}
        assert make_block_map(unsure, 2, 2) == BlockMap((), ())

    @pytest.mark.parametrize("counts", [(2, 4), (0, 0)])
    def test_written_map_reads_back(self, tmp_path, counts: tuple[int, int]):
        result = judge({**ROWS, ALL: row(0.9, 0.9)}, *counts, base="tiny-xl", measure="statistics")
        (tmp_path / "blocks.toml").write_text(to_toml(result))
        assert read_blocks(str(tmp_path / "blocks.toml")) == make_block_map(ROWS, *counts)


def test_scores_use_the_movements_of_both_axes():
    content = torch.tensor([[[0.1], [0.3]], [[1.0], [1.0]]])  # [blocks + all, pairs, seeds]
    rows = score_rows(["a", ALL], {"content": content, "style": content / 2}, "tiny-xl")
    assert rows["a"].content.mean == pytest.approx(0.2)
    assert rows["a"].style.mean == pytest.approx(0.1)
    assert rows[ALL].style.mean == pytest.approx(0.5)
    with pytest.raises(UserError, match="tiny-xl makes the same images whatever the style words"):
        score_rows(["a", ALL], {"content": content, "style": content * math.nan}, "tiny-xl")


def test_table_shows_scores_leaning_and_map():
    text = format_findings(judge({**ROWS, ALL: row(0.9, 0.8, error=0.02)}, 2, 4, base="tiny-xl", measure="statistics"))
    lines = {line.split()[0]: line.split() for line in text.splitlines() if "_block" in line}
    assert list(lines) == list(ROWS)
    assert lines["up_blocks.0.attentions.0"][1:] == ["0.600", "±", "0.000", "0.300", "±", "0.000", "+1.41", "content"]
    assert lines["up_blocks.0.attentions.1"][-2:] == ["-1.41", "style"]
    assert "0.900 ± 0.020" in text
    assert max(map(len, text.splitlines())) <= 100


def test_nan_becomes_null():
    assert to_lists(torch.tensor([[[0.25, math.nan]]])) == [[[0.25, None]]]
