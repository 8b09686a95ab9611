"""Column separation of UnZipLoRA (arXiv 2412.04465, section 3): which columns of a layer each LoRA trains.

A column is an output feature i of a linear layer, one row of B [out, r]. Each LoRA has a hard mask (0 or 1) and a soft
scale m per column, and acts as ΔW = diag(mask ⊙ m) B A (`Branch`). The run has periods, and each goes through:

1. Warm-up: all columns are open, scales are frozen (`ColumnSeparation.open`).
2. Scoring: C = ΔW ⊙ ∂L/∂ΔW (Cones, arXiv 2303.05125); the score of column i is mean_j |C_ij| (`Scores`).
3. Choice: each LoRA takes its best columns, content first, and keeps those chosen before (`choose`).
4. Training: all other columns are closed. Where both LoRAs have a column open, the scales train too, against
   L⊥ = mean_i |m_c^i · m_s^i|, the orthogonality loss (`training.loss.orthogonality`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from unziplora.config.recipe import KINDS
from unziplora.lora.layer import Branch
from unziplora.training.loss import orthogonality

LoraBranches = Mapping[str, Mapping[str, Branch]]
"""Branches by LoRA name and module path."""

CONE_THRESHOLD = 1e-5
"""Entries of |C| above this count in the official code (Cones, arXiv 2303.05125)."""

FP16_SCALE = 2.0**16
"""Initial factor of torch's gradient scaler; the official code scores gradients that are multiplied by it."""


@dataclass(frozen=True)
class Phase:
    """Place of a step in the schedule of column choices.

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
    """Return the phase of a step, 0 ≤ step < steps; the last period includes the remainder of the division."""
    length = steps // periods
    period = min(step // length, periods - 1)
    offset = step - period * length
    return Phase(period, opens=offset == 0, chooses=offset == warmup, warm=offset < warmup)


def columns_held(columns: int, share: float, period: int, periods: int) -> int:
    """Count the columns that a LoRA holds after the choice of a period: share · (period + 1) / periods of them."""
    return round(columns * share * (period + 1) / periods)


@dataclass
class Scores:
    """Accumulator of one layer's column scores over several noisy latents: `total`, their sum, [out].

    Attributes:
        official_code: score a column by the share of its entries with |C| > 1e-5, instead of their mean.
        gradient_scale: factor of the loss, divided out of C.
    """

    official_code: bool = False
    gradient_scale: float = 1.0
    total: Tensor | None = None

    def __call__(self, gradient: Tensor, delta: Tensor) -> None:
        """Add ∂L/∂ΔW and ΔW, both [out, in] (the observer of `Branch`)."""
        cone = (gradient * delta).abs() / self.gradient_scale
        cone = cone.nan_to_num(nan=0.0, posinf=0.0)  # overflow of fp16 carries no information; such steps are skipped
        score = (cone > CONE_THRESHOLD).float().mean(dim=1) if self.official_code else cone.mean(dim=1)
        self.total = score if self.total is None else self.total + score


def choose(scores: Tensor, held: Tensor, closed: Tensor, count: int, official_code: bool = False) -> Tensor:
    """Add the best-scored columns to those held, so that exactly `count` are held; return them, [out] bool.

    Ties go to the lower index.

    Args:
        scores: one score per column, [out].
        held: columns held so far; they stay held, [out] bool.
        closed: columns that are chosen only when no others are left, [out] bool.
        count: number of columns.
        official_code: choose the columns that score strictly above the `count`-th, ranking held ones too, and never
            closed ones. If all columns tie, this chooses none.
    """
    device = scores.device
    # On the CPU: one number per column, and Apple's GPUs have no double precision.
    rank, held, closed = scores.cpu().double().clone(), held.cpu(), closed.cpu()
    rank[closed] -= rank.max() - rank.min() + 1
    if official_code:
        best = rank > rank.sort(descending=True).values[count - 1] if count else torch.zeros_like(held)
        return (held | best & ~closed).to(device)
    new = max(0, count - int(held.sum()))
    rank[held] = -torch.inf
    chosen = held.clone()
    chosen[torch.argsort(rank, descending=True, stable=True)[:new]] = True
    return chosen.to(device)


class ColumnSeparation:
    """State of the column separation of two LoRAs over the same layers.

    A LoRA trains all columns of the layers that it owns (block separation), and of others only the columns it holds.

    Attributes:
        branches: all branches, by LoRA name and module path.
        held: columns chosen so far, [out] bool, by LoRA name and module path of the masked layers.
        official_code: score and choose like the official code, and let weight decay and momentum move closed columns.
        overlap: columns that both LoRAs have open, [out] 0/1, by module path; layers without any are left out.
    """

    def __init__(self, branches: LoraBranches, owners: Mapping[str, str | None], official_code: bool = False) -> None:
        self.branches, self.official_code = branches, official_code
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
        """Yield the branches that train only chosen columns, with their LoRA's name and module path."""
        for name, layers in self.held.items():
            for path in layers:
                yield name, path, self.branches[name][path]

    def state_dict(self) -> dict[str, Tensor]:
        """Return the held columns, [out] bool, by a name for a checkpoint."""
        return {f"{name}.{path}.held": self.held[name][path] for name, path, _ in self.masked()}

    def open(self) -> None:
        """Open every column: a warm-up begins."""
        for _, _, branch in self.masked():
            branch.mask.fill_(1.0)

    @contextmanager
    def scored(self, gradient_scale: float) -> Iterator[dict[str, dict[str, Scores]]]:
        """Score the masked branches' columns in the backward passes inside, of a loss times `gradient_scale`."""
        if self.official_code:  # fp16's factor is not divided out; other number formats get its initial value
            gradient_scale = gradient_scale / (FP16_SCALE if gradient_scale == 1 else gradient_scale)
        scores: dict[str, dict[str, Scores]] = {name: {} for name in KINDS}
        for name, path, branch in self.masked():
            branch.observer = scores[name][path] = Scores(self.official_code, gradient_scale)
        try:
            yield scores
        finally:
            for _, _, branch in self.masked():
                branch.observer = None

    def choose(self, scores: Mapping[str, Mapping[str, Scores]], share: float, period: int, periods: int) -> None:
        """Choose columns for content, then for style among the columns that content does not hold."""
        for name in KINDS:
            for path, held in self.held[name].items():
                total = scores[name][path].total
                assert total is not None, f"no gradient reached {path}"
                closed = torch.zeros_like(held)
                if name == "style":
                    # Where content owns the layer and trains every column, style may choose any of them.
                    closed = self.held["content"].get(path, closed)
                # The official code takes the best of each period's scores, regardless of what is held already.
                count = columns_held(len(held), share, 0 if self.official_code else period, periods)
                self.held[name][path] = choose(total, held, closed, count, self.official_code)

    def close(self) -> None:
        """Close the columns that are not held: from now on they have no effect and no gradient."""
        for name, path, branch in self.masked():
            branch.mask.copy_(self.held[name][path])
        self.zero_masked()

    @torch.no_grad()
    def zero_masked(self) -> None:
        """Reset the rows of B of closed columns to zero after weight decay and momentum have moved them."""
        if not self.official_code:
            branches = [branch for _, _, branch in self.masked()]
            torch._foreach_mul_([b.up for b in branches], [b.mask[:, None] for b in branches])

    @torch.no_grad()
    def clamp_scales(self) -> None:
        """Clamp every soft scale to [0, 1]."""
        scales = [branch.scale for name in KINDS for branch in self.branches[name].values()]
        torch._foreach_clamp_min_(scales, 0.0)
        torch._foreach_clamp_max_(scales, 1.0)

    def settle_scales(self, frozen: bool) -> None:
        """Train the scales of layers with an overlap, or none, until masks change."""
        self.overlap = {}
        for path, content in self.branches["content"].items():
            style = self.branches["style"][path]
            both = content.mask * style.mask
            if both.any():
                self.overlap[path] = both
            for branch in (content, style):
                branch.scale.requires_grad_(not frozen and path in self.overlap)
                branch.scale.grad = None

    @torch.no_grad()
    def gate_scales(self) -> None:
        """Zero the scales' gradients outside the columns that both LoRAs have open."""
        gated = [
            (gradient, both)
            for path, both in self.overlap.items()
            for name in KINDS
            if (gradient := self.branches[name][path].scale.grad) is not None
        ]
        if gated:
            torch._foreach_mul_(*map(list, zip(*gated, strict=True)))

    def orthogonality(self) -> Tensor:
        """Return L⊥ of the effective scales mask ⊙ m over all layers, a scalar (`training.loss.orthogonality`)."""
        content, style = (self.branches[name] for name in KINDS)
        if not self.overlap:
            return next(iter(content.values())).scale.new_zeros(())
        # Layers without an overlap add zeros to the mean over layers.
        open_scales = torch._foreach_mul(list(self.overlap.values()), [content[path].scale for path in self.overlap])
        pairs = list(zip(open_scales, (style[path].scale for path in self.overlap), strict=True))
        return orthogonality(pairs) * (len(pairs) / len(content))
