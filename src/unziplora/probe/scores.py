"""From pictures to a block map: how far each block moves them, which axis it leans to, and the table of it."""

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
"""A block that moves pictures by less than this share of the way to Q is in no map."""


class Score(BaseModel):
    """How far pictures moved from P (0) to Q (1), over the pairs of prompts.

    Attributes:
        mean: over pairs and seeds.
        error: standard error of the mean over pairs, whose seeds are averaged first; None for one pair.
        pairs: pairs that it was taken over: those whose P and Q look different to the measure.
    """

    mean: float
    error: float | None
    pairs: int

    @property
    def moves(self) -> bool:
        """Whether this is a movement at all: at least `LEAST`, and twice its standard error."""
        return self.mean >= max(LEAST, 2 * (self.error or 0.0))

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + ("" if self.error is None else f" ± {self.error:.3f}")


class Row(BaseModel):
    """The two scores of a block."""

    content: Score
    style: Score


class Findings(BaseModel):
    """What the probe found.

    Attributes:
        base: the base's name.
        measure: what pictures were compared by.
        blocks: by block, in the order of computation.
        together: with all blocks swapped at once; the remainder up to 1 is due to the pooled embedding.
        leans: standardized difference of a block's two scores, see `leans`.
        content, style: the block map, the clearest block first.
        files: what was written.
    """

    base: str
    measure: str
    blocks: dict[str, Row]
    together: Row
    leans: dict[str, float]
    content: list[str]
    style: list[str]
    files: dict[str, str] = {}

    def owner(self, block: str) -> str:
        """`content`, `style`, or nothing."""
        return next((axis for axis in KINDS if block in getattr(self, axis)), "")


def movement(x: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """d(x, P) / (d(x, P) + d(x, Q)) of features [..., D] → [...], with Euclidean distances.

    It is 0 where x is as P and 1 where it is as Q. A change to something else counts too: what is as far from P as
    from Q has 0.5. NaN where P and Q do not differ.
    """
    from_p, from_q = (x - p).norm(dim=-1), (x - q).norm(dim=-1)
    apart = ((p - q).norm(dim=-1) > 1e-5).expand_as(from_p)
    return torch.where(apart, from_p / (from_p + from_q), torch.nan)


def score(values: Tensor) -> Score | None:
    """The score of one block from its movements, [pairs, seeds]; None where no pair has one (NaN)."""
    means = values.double().nanmean(dim=1)
    means = means[~means.isnan()]
    count = len(means)
    if count == 0:
        return None
    error = (means.std() / count**0.5).item() if count > 1 else None
    return Score(mean=means.mean().item(), error=error, pairs=count)


def leans(rows: Mapping[str, Row]) -> dict[str, float]:
    """By block, z_content − z_style: each score in standard deviations above the mean of all blocks.

    Swaps of a style often move pictures farther than swaps of a content, or the other way round; standardizing
    makes the two comparable. Above 0: more of a content block than the others are.
    """
    differences = torch.zeros(len(rows), dtype=torch.float64)
    for axis, sign in (("content", 1), ("style", -1)):
        means = torch.tensor([getattr(row, axis).mean for row in rows.values()], dtype=torch.float64)
        spread = means.std(correction=0)
        if spread > 0:
            differences += sign * (means - means.mean()) / spread
    return dict(zip(rows, differences.tolist(), strict=True))


def choose(rows: Mapping[str, Row], content_blocks: int, style_blocks: int) -> BlockMap:
    """The block map: the blocks that lean farthest to each side, and move pictures on that axis at all."""
    lean = leans(rows)
    ranked = sorted(rows, key=lambda block: lean[block], reverse=True)
    content = [block for block in ranked if lean[block] > 0 and rows[block].content.moves]
    style = [block for block in reversed(ranked) if lean[block] < 0 and rows[block].style.moves]
    return BlockMap(tuple(content[:content_blocks]), tuple(style[:style_blocks]))


def score_rows(names: Sequence[str], values: Mapping[str, Tensor], base: str) -> dict[str, Row]:
    """The scores by block from all movements, by axis [blocks, pairs, seeds].

    Raises:
        UserError: P and Q look the same in every pair of an axis.
    """
    rows = {}
    for number, name in enumerate(names):
        scores = {}
        for axis in KINDS:
            found = score(values[axis][number])
            if found is None:
                raise UserError(
                    f"base {base} draws the same pictures whatever the {axis} words: give words that it knows with "
                    f"--{axis}s, or more --steps"
                )
            scores[axis] = found
        rows[name] = Row(content=scores["content"], style=scores["style"])
    return rows


def judge(rows: Mapping[str, Row], content_blocks: int, style_blocks: int, base: str, measure: str) -> Findings:
    """The findings from the scores of the blocks and of `ALL` together."""
    blocks = {name: row for name, row in rows.items() if name != ALL}
    chosen = choose(blocks, content_blocks, style_blocks)
    return Findings(
        base=base,
        measure=measure,
        blocks=blocks,
        together=rows[ALL],
        leans=leans(blocks),
        content=list(chosen.content),
        style=list(chosen.style),
    )


def plain(values: Tensor) -> list[Any]:
    """Movements [blocks, pairs, seeds] as nested lists, with None for NaN, which JSON lacks."""
    return [[[None if x != x else round(x, 5) for x in pair] for pair in block] for block in values.tolist()]


def to_toml(findings: Findings) -> str:
    """The block map as `read_blocks` reads it."""
    head = f"# Block map of base {findings.base}, found by `unziplora blocks`; for `unziplora split --blocks`.\n"
    return head + tomli_w.dumps({axis: getattr(findings, axis) for axis in KINDS})


def table(findings: Findings) -> str:
    """Scores, leaning and map of every block, as text."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    grid.add_column("block", no_wrap=True)
    for name in ("content", "style", "leaning"):
        grid.add_column(name, justify="right", no_wrap=True)
    grid.add_column("map", no_wrap=True)
    for block, row in findings.blocks.items():
        lean = f"{findings.leans[block]:+.2f}"
        grid.add_row(block, str(row.content), str(row.style), lean, findings.owner(block))
    grid.add_section()
    grid.add_row(ALL, str(findings.together.content), str(findings.together.style), "", "")
    buffer = io.StringIO()
    Console(file=buffer, width=100, color_system=None).print(grid)
    return "\n".join(line.rstrip() for line in buffer.getvalue().strip("\n").splitlines())
