"""Recipes of `sample` and `grid`."""

import pytest

from unziplora.config.recipe import resolve
from unziplora.config.sample import GridConfig, SampleConfig, read_blocks
from unziplora.errors import UserError


def test_block_strengths_are_read_by_block() -> None:
    assert read_blocks(["up_blocks.0=0.5", "up_blocks.0.attentions.1 = 2", "mid_block.=-1"]) == {
        "up_blocks.0": 0.5,
        "up_blocks.0.attentions.1": 2.0,
        "mid_block": -1.0,
    }


@pytest.mark.parametrize("second", ["a=0.5", "a=1", " a =1", "a.=1"])
def test_second_strength_of_a_block_is_an_error(second: str) -> None:
    with pytest.raises(UserError, match=r"content_blocks: a has two strengths, 0\.5 and"):
        resolve(SampleConfig, {"content": "x", "content_blocks": ["a=0.5", second]})


def test_grid_has_no_batch_size() -> None:
    with pytest.raises(UserError, match="unknown key 'batch_size'"):
        resolve(GridConfig, {"content": "x", "batch_size": 2})
    assert resolve(SampleConfig, {"content": "x", "batch_size": 2}).batch_size == 2
