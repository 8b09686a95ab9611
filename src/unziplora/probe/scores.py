"""Scores of blocks: the movement of images, the leaning of a block to content or style, and the block map."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import tomli_w
import torch
from pydantic import BaseModel
from torch import Tensor

from unziplora.config.recipe import KINDS
from unziplora.errors import UserError
from unziplora.lora.blocks import BlockMap

ALL = "all blocks"
"""Name of the row with every block swapped at once."""

LEAST = 0.05
"""Movement below which a block is in no map, as a share of the way to Q."""


class Score(BaseModel):
    """Movement of images from P (0) to Q (1), over the pairs of prompts.

    Attributes:
        error: standard error of the mean over pairs, after averaging over seeds; None for one pair.
        pairs: number of pairs; a pair counts only if P and Q look different to the measure.
    """

    mean: float
    error: float | None
    pairs: int

    @property
    def moves(self) -> bool:
        """True if the movement is at least `LEAST` and at least twice its standard error."""
        return self.mean >= max(LEAST, 2 * (self.error or 0.0))

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + ("" if self.error is None else f" ± {self.error:.3f}")


class BlockScores(BaseModel):
    """Content score and style score of a block."""

    content: Score
    style: Score


class Findings(BaseModel):
    """Result of the probe.

    Attributes:
        blocks: scores by block, in the order of computation.
        together: scores with all blocks swapped at once; the rest up to 1 comes from the pooled embedding.
        leans: standardized difference of a block's two scores, see `leanings`.
        content, style: the block map, the clearest block first.
    """

    base: str
    measure: str
    blocks: dict[str, BlockScores]
    together: BlockScores
    leans: dict[str, float]
    content: list[str]
    style: list[str]
    files: dict[str, str] = {}

    def owner(self, block: str) -> str:
        """Return the axis whose map contains the block: `content`, `style` or an empty string."""
        return next((axis for axis in KINDS if block in getattr(self, axis)), "")


def movement(x: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """Return d(x, P) / (d(x, P) + d(x, Q)) of features [..., D] → [...], with Euclidean distances.

    It is 0 if x equals P, and 1 if x equals Q. A change to something else counts too: at equal distances from P and Q
    it is 0.5. It is NaN if P and Q do not differ.
    """
    from_p, from_q = (x - p).norm(dim=-1), (x - q).norm(dim=-1)
    differ = ((p - q).norm(dim=-1) > 1e-5).expand_as(from_p)
    return torch.where(differ, from_p / (from_p + from_q), torch.nan)


def score(values: Tensor) -> Score | None:
    """Return the score of one block from its movements, [pairs, seeds]; None if all are NaN."""
    means = values.double().nanmean(dim=1)
    means = means[~means.isnan()]
    count = len(means)
    if count == 0:
        return None
    error = (means.std() / count**0.5).item() if count > 1 else None
    return Score(mean=means.mean().item(), error=error, pairs=count)


def leanings(rows: Mapping[str, BlockScores]) -> dict[str, float]:
    """Return z_content − z_style by block; z is a score in standard deviations above the mean of all blocks.

    Swaps of style often move images farther than swaps of content, or the other way round. Standardizing makes the two
    comparable. A positive value means that the block decides content more than other blocks do.
    """
    differences = torch.zeros(len(rows), dtype=torch.float64)
    for axis, sign in (("content", 1), ("style", -1)):
        means = torch.tensor([getattr(row, axis).mean for row in rows.values()], dtype=torch.float64)
        spread = means.std(correction=0)
        if spread > 0:
            differences += sign * (means - means.mean()) / spread
    return dict(zip(rows, differences.tolist(), strict=True))


def make_block_map(rows: Mapping[str, BlockScores], content_blocks: int, style_blocks: int) -> BlockMap:
    """Return the blocks that lean farthest to each side, if they move images on that axis."""
    leaning = leanings(rows)
    ranked = sorted(rows, key=lambda block: leaning[block], reverse=True)
    content = [block for block in ranked if leaning[block] > 0 and rows[block].content.moves]
    style = [block for block in reversed(ranked) if leaning[block] < 0 and rows[block].style.moves]
    return BlockMap(tuple(content[:content_blocks]), tuple(style[:style_blocks]))


def score_rows(names: Sequence[str], values: Mapping[str, Tensor], base: str) -> dict[str, BlockScores]:
    """Return the scores by block from all movements, by axis [blocks, pairs, seeds].

    Raises:
        UserError: P and Q look the same in all pairs of an axis.
    """
    rows = {}
    for number, name in enumerate(names):
        scores = {}
        for axis in KINDS:
            result = score(values[axis][number])
            if result is None:
                raise UserError(
                    f"base {base} makes the same images whatever the {axis} words: name words that it knows with "
                    f"--{axis}s, or raise --steps"
                )
            scores[axis] = result
        rows[name] = BlockScores(content=scores["content"], style=scores["style"])
    return rows


def judge(rows: Mapping[str, BlockScores], content_blocks: int, style_blocks: int, base: str, measure: str) -> Findings:
    """Make the findings from the scores of the blocks and of `ALL`."""
    blocks = {name: row for name, row in rows.items() if name != ALL}
    block_map = make_block_map(blocks, content_blocks, style_blocks)
    return Findings(
        base=base,
        measure=measure,
        blocks=blocks,
        together=rows[ALL],
        leans=leanings(blocks),
        content=list(block_map.content),
        style=list(block_map.style),
    )


def to_lists(values: Tensor) -> list[Any]:
    """Convert movements [blocks, pairs, seeds] to nested lists, with None for NaN, which JSON lacks."""
    return [[[None if x != x else round(x, 5) for x in pair] for pair in block] for block in values.tolist()]


def to_toml(findings: Findings) -> str:
    """Format the block map for `read_blocks`."""
    head = f"# Block map of base {findings.base}, found by `unziplora blocks`; for `unziplora split --blocks`.\n"
    return head + tomli_w.dumps({axis: getattr(findings, axis) for axis in KINDS})


def format_findings(findings: Findings) -> str:
    """Format scores, leaning and map of every block as a text table."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("block", no_wrap=True)
    for name in ("content", "style", "leaning"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("map", no_wrap=True)
    for block, row in findings.blocks.items():
        lean = f"{findings.leans[block]:+.2f}"
        table.add_row(block, str(row.content), str(row.style), lean, findings.owner(block))
    table.add_section()
    table.add_row(ALL, str(findings.together.content), str(findings.together.style), "", "")
    buffer = io.StringIO()
    Console(file=buffer, width=100, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in buffer.getvalue().strip("\n").splitlines())
