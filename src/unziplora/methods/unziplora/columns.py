"""Column separation: when columns are scored, how, and which ones a LoRA holds (arXiv 2412.04465).

A column is an output feature of a linear layer. Pure functions; the method keeps the state.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from unziplora.config.recipe import KINDS
from unziplora.lora.layer import Branch
from unziplora.training.loss import orthogonality

LoraBranches = Mapping[str, Mapping[str, Branch]]
"""Branches by LoRA name and module path."""

CONE_THRESHOLD = 1e-5
"""An entry of ΔW ⊙ ∂L/∂ΔW counts as important above this (Cones, arXiv 2303.05125; the official code)."""


@dataclass(frozen=True)
class Phase:
    """Where a step lies in the schedule of column choices.

    Attributes:
        period: index of the current period, from 0.
        opens: this step begins a warm-up: all columns of both LoRAs are open.
        chooses: columns are scored and chosen just before this step.
        warm: the step belongs to a warm-up; scales are frozen, and there is no orthogonality loss.
    """

    period: int
    opens: bool
    chooses: bool
    warm: bool


def phase(step: int, steps: int, periods: int, warmup: int) -> Phase:
    """Phase of a step, 0 ≤ step < steps; the last period takes the remainder of the division."""
    length = steps // periods
    period = min(step // length, periods - 1)
    offset = step - period * length
    return Phase(period, opens=offset == 0, chooses=offset == warmup, warm=offset < warmup)


def columns_held(columns: int, share: float, period: int, periods: int) -> int:
    """Columns that a LoRA holds after the choice of a period: share · (period + 1) / periods of them."""
    return round(columns * share * (period + 1) / periods)


@dataclass
class Scores:
    """Accumulates the scores of one layer's columns over several noisy latents.

    Attributes:
        kind: `importance`, the mean of |C| over a column's entries, or `threshold`, the share of entries
            with |C| > 1e-5, where C = ΔW ⊙ ∂L/∂ΔW.
        gradient_scale: what the loss was multiplied by; divided out of C.
    """

    kind: str
    gradient_scale: float = 1.0
    total: Tensor | None = field(default=None)

    def __call__(self, gradient: Tensor, delta: Tensor) -> None:
        """Add ∂L/∂ΔW and ΔW, both [out, in] (the observer of `Branch`)."""
        cone = (gradient * delta).abs() / self.gradient_scale
        cone = cone.nan_to_num(nan=0.0, posinf=0.0)  # a gradient beyond fp16 says nothing, as in the steps it skips
        score = cone.mean(dim=1) if self.kind == "importance" else (cone > CONE_THRESHOLD).float().mean(dim=1)
        self.total = score if self.total is None else self.total + score


def choose(scores: Tensor, held: Tensor, closed: Tensor, count: int, how: str = "exact") -> Tensor:
    """Add the best-scored columns to those held, [out] bool.

    Args:
        scores: one score per column, [out].
        held: columns held so far; they stay held, [out] bool.
        closed: columns that must not be chosen, [out] bool; they are taken only when no others are left.
        count: how many columns; what that means says `how`.
        how: `exact` holds exactly `count` afterwards (ties go to the lower index); `strict` adds those that score
            strictly above the `count`-th, held ones ranked too: none at all if all tie (the official code).
    """
    device = scores.device
    # On the CPU: one number per column, and Apple's GPUs have no double precision.
    rank, held, closed = scores.cpu().double().clone(), held.cpu(), closed.cpu()
    rank[closed] -= rank.max() - rank.min() + 1
    if how == "strict":
        best = rank > rank.sort(descending=True).values[count - 1] if count else torch.zeros_like(held)
        return (held | best & ~closed).to(device)
    new = max(0, count - int(held.sum()))
    rank[held] = -torch.inf
    chosen = held.clone()
    chosen[torch.argsort(rank, descending=True, stable=True)[:new]] = True
    return chosen.to(device)


class ColumnSeparation:
    """Column separation of two LoRAs over the same layers (arXiv 2412.04465).

    A LoRA trains all columns of the layers that it owns; of the others only the columns that it holds.

    Attributes:
        branches: all branches, by LoRA name and module path.
        held: the columns chosen so far, [out] bool, by LoRA name and module path of the masked layers.
        keep_masked: rows of B of columns that are not held stay zero; otherwise the optimizer's weight
            decay and momentum may move them (the official code).
        overlap: columns that both LoRAs have open, [out] 0/1, by module path, where there are any.
    """

    def __init__(self, branches: LoraBranches, owners: Mapping[str, str | None], keep_masked: bool = True) -> None:
        self.branches, self.keep_masked = branches, keep_masked
        self.overlap: dict[str, Tensor] = {}
        self.held = {
            name: {
                path: torch.zeros_like(branch.mask, dtype=torch.bool)
                for path, branch in branches[name].items()
                if owners[path] != name
            }
            for name in KINDS
        }

    def masked(self) -> Iterator[tuple[str, str, Branch]]:
        """The branches that train only chosen columns, with their LoRA's name and module path."""
        for name in KINDS:
            for path in self.held[name]:
                yield name, path, self.branches[name][path]

    def items(self) -> Iterator[tuple[str, str, Tensor]]:
        """The held columns, [out] bool, with their LoRA's name and module path."""
        for name in KINDS:
            for path, held in self.held[name].items():
                yield name, path, held

    def open(self) -> None:
        """Open every column: a warm-up begins."""
        for _, _, branch in self.masked():
            branch.mask.fill_(1.0)

    @contextmanager
    def scored(self, kind: str, gradient_scale: float) -> Iterator[dict[str, dict[str, Scores]]]:
        """Score the masked branches' columns in the backward passes inside; see `Scores`."""
        scores: dict[str, dict[str, Scores]] = {name: {} for name in KINDS}
        for name, path, branch in self.masked():
            branch.observer = scores[name][path] = Scores(kind, gradient_scale)
        try:
            yield scores
        finally:
            for _, _, branch in self.masked():
                branch.observer = None

    def choose(
        self, scores: Mapping[str, Mapping[str, Scores]], share: float, period: int, periods: int, how: str
    ) -> None:
        """Content chooses first, style among the columns that content does not hold."""
        for name in KINDS:
            for path, held in self.held[name].items():
                total = scores[name][path].total
                assert total is not None, f"no gradient reached {path}"
                closed = torch.zeros_like(held)
                if name == "style":
                    # Where content owns the layer and trains every column, style may choose any of them.
                    closed = self.held["content"].get(path, closed)
                # The official code takes the best of each period's scores, whatever is held already.
                count = columns_held(len(held), share, 0 if how == "strict" else period, periods)
                self.held[name][path] = choose(total, held, closed, count, how)

    def close(self) -> None:
        """Close the columns that are not held: they take no part any more."""
        for name, path, branch in self.masked():
            branch.mask.copy_(self.held[name][path])
        self.zero_masked()

    @torch.no_grad()
    def zero_masked(self) -> None:
        """Put the rows of B of closed columns back to zero, whatever the optimizer did to them."""
        if self.keep_masked:
            branches = [branch for _, _, branch in self.masked()]
            torch._foreach_mul_([b.up for b in branches], [b.mask[:, None] for b in branches])

    @torch.no_grad()
    def clamp_scales(self) -> None:
        """Keep every soft scale in [0, 1]."""
        scales = [branch.scale for name in KINDS for branch in self.branches[name].values()]
        torch._foreach_clamp_min_(scales, 0.0)
        torch._foreach_clamp_max_(scales, 1.0)

    def settle_scales(self, frozen: bool, overlap_only: bool) -> None:
        """Say which scales train from here on, until masks change: none, those in an overlap, or all."""
        self.overlap = {}
        for path, content in self.branches["content"].items():
            style = self.branches["style"][path]
            both = content.mask * style.mask
            if both.any():
                self.overlap[path] = both
            trains = not frozen and (path in self.overlap or not overlap_only)
            for branch in (content, style):
                branch.scale.requires_grad_(trains)
                branch.scale.grad = None

    @torch.no_grad()
    def gate_scales(self) -> None:
        """Keep the scales' gradients only in columns that both LoRAs have open."""
        found = [
            (gradient, both)
            for path, both in self.overlap.items()
            for name in KINDS
            if (gradient := self.branches[name][path].scale.grad) is not None
        ]
        if found:
            torch._foreach_mul_(*map(list, zip(*found, strict=True)))

    def orthogonality(self) -> Tensor:
        """L⊥ on the effective scales, mask ⊙ scale, over all layers; a scalar."""
        content, style = (self.branches[name] for name in KINDS)
        if not self.overlap:
            return next(iter(content.values())).scale.new_zeros(())
        # Layers without an overlap add zeros to the mean over layers.
        open_scales = torch._foreach_mul(list(self.overlap.values()), [content[path].scale for path in self.overlap])
        pairs = list(zip(open_scales, (style[path].scale for path in self.overlap), strict=True))
        return orthogonality(pairs) * (len(pairs) / len(content))
