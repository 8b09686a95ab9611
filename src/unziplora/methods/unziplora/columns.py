"""Column separation: when columns are scored, how, and which ones a LoRA holds (arXiv 2412.04465).

A column is an output feature of a linear layer. Pure functions; the method keeps the state.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

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


def orthogonality(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """L⊥, the mean over layers of mean_i |m_c^i · m_s^i| (arXiv 2412.04465; means as in the code).

    Args:
        pairs: per layer, the effective scales mask ⊙ scale of the content and the style LoRA, [out] each.
    """
    by_width: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for pair in pairs:
        by_width.setdefault(len(pair[0]), []).append(pair)
    # Layers of a width together: SDXL has hundreds, and their kernels would cost more than their arithmetic.
    stacks = [map(torch.stack, zip(*alike, strict=True)) for alike in by_width.values()]
    return torch.cat([(content * style).abs().mean(1) for content, style in stacks]).mean()
