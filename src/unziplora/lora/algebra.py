"""Algebra of LoRA pairs, ΔW = B A (arXiv 2106.09685), in fp32 and where possible without forming ΔW.

A pair is (down, up) = (A, B) with A [rank, in] and B [out, rank]. A convolution has A [rank, in, kh, kw] and
B [out, rank, 1, 1]; they are flattened for the computation, and the results have these shapes again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]
"""A and B of one module."""

_FP16_SMALL = 2.0**-10
"""Mean below which part of a matrix is under 6e-5, where fp16 has fewer digits."""
_FP16_LOSS = 2.0**-10
"""Relative error above which fp16 rounds by more than its own precision, 2⁻¹¹ per number."""


def _matrices(pair: Pair) -> Pair:
    """Return a pair as two fp32 matrices, A [rank, in·kh·kw] and B [out, rank]."""
    down, up = pair
    return down.float().flatten(1), up.float().flatten(1)


def _shaped(down: Tensor, up: Tensor, like: Pair) -> Pair:
    """Reshape matrices of any rank to the form of another pair, linear or convolution."""
    return down.reshape(-1, *like[0].shape[1:]), up.reshape(up.shape[0], -1, *like[1].shape[2:])


def delta(pair: Pair) -> Tensor:
    """Return the dense update ΔW = B A in fp32, [out, in] or [out, in, kh, kw]."""
    down, up = _matrices(pair)
    return (up @ down).reshape(shape(pair))


def shape(pair: Pair) -> tuple[int, ...]:
    """Return the shape of ΔW, (out, in) or (out, in, kh, kw)."""
    down, up = pair
    return up.shape[0], *down.shape[1:]


def scale(pair: Pair, weight: float) -> Pair:
    """Return the pair of weight · ΔW."""
    return pair[0].float(), pair[1].float() * weight


def fold_output(pair: Pair, columns: Tensor) -> Pair:
    """Return the pair of diag(columns) ΔW, columns [out]: B · columns[:, None] (arXiv 2412.04465)."""
    down, up = pair
    return down.float(), up.float() * columns.float().reshape(-1, *[1] * (up.dim() - 1))


def cat(pairs: Sequence[Pair]) -> Pair:
    """Return the pair of Σ ΔWᵢ, exactly, by concatenating the factors to rank Σ rᵢ."""
    return torch.cat([down.float() for down, _ in pairs], dim=0), torch.cat([up.float() for _, up in pairs], dim=1)


def norm(pair: Pair) -> float:
    """Return the Frobenius norm of ΔW, computed from [rank, rank] Gram matrices: ‖B A‖² = ⟨BᵀB, A Aᵀ⟩."""
    down, up = _matrices(pair)
    return float(((up.T @ up) * (down @ down.T)).sum().clamp(min=0).sqrt())


def resize(pair: Pair, rank: int | None = None, energy: float | None = None) -> Pair:
    """Return the best approximation of ΔW by a lower rank (Eckart–Young): A = √s Vᵀ, B = U √s.

    With the QR decompositions B = Q_b R_b and Aᵀ = Q_a R_a, only R_b R_aᵀ [rank, rank] has to be decomposed. The
    cost is O((out + in) rank²), and ΔW is never formed.

    Args:
        pair: the pair to approximate.
        rank: highest rank of the result.
        energy: lowest share of ‖ΔW‖² to keep, 0 < energy ≤ 1. The result has the lowest rank that does, at least 1.
    """
    u, s, vh = _svd(pair)
    keep = len(s) if rank is None else min(rank, len(s))
    if energy is not None:
        keep = min(keep, _principal(s, energy))
    root = s[:keep].sqrt()
    return _shaped(root[:, None] * vh[:keep], u[:, :keep] * root, pair)


def project(pair: Pair, away_from: Pair, share: float, energy: float) -> Pair:
    """Return the pair of ΔW (I − share · V Vᵀ), V the principal input directions of another ΔW (arXiv 2511.11051).

    Args:
        share: 0 leaves the pair as it is; 1 makes it blind to these directions. The paper's μ is share / (1 − share).
        energy: share of the other's ‖ΔW‖² that its principal directions make up, at least one direction.
    """
    down, up = _matrices(pair)
    _, s, vh = _svd(away_from)
    principal = vh[: _principal(s, energy)] if s.any() else vh[:0]  # an empty ΔW has no directions
    return _shaped(down - share * (down @ principal.T) @ principal, up, pair)


def _svd(pair: Pair) -> tuple[Tensor, Tensor, Tensor]:
    """Return U, s and Vᵀ of ΔW. Only a matrix [rank, rank] is decomposed, and ΔW is never formed."""
    down, up = _matrices(pair)
    q_up, r_up = torch.linalg.qr(up)
    q_down, r_down = torch.linalg.qr(down.T)
    u, s, vh = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
    return q_up @ u, s, vh @ q_down.T


def _principal(s: Tensor, energy: float) -> int:
    """Return the number of largest singular values that make up a share of Σ s², at least 1."""
    total = s.double().square().cumsum(0)
    # A small tolerance keeps rounding errors from adding a useless direction.
    return min(len(s), int((total < energy * total[-1] * (1 - 1e-9)).sum()) + 1)


def balance(pair: Pair) -> Pair:
    """Move powers of two between A and B where fp16 would lose digits; ΔW stays exactly the same.

    B is small as a whole after short training, or with an alpha far below the rank folded into it. Single rows of A or
    columns of B may be below or above fp16's range, 6e-8 to 65504, while their counterparts are not.
    """
    down, up = pair
    size, small = (float(factor.detach().abs().mean()) for factor in pair)
    if 0 < small < min(size, _FP16_SMALL):
        shift = 2.0 ** math.floor(math.log2(size / small) / 2)
        down, up = down / shift, up * shift
    rows, columns = down.detach().flatten(1).double(), up.detach().flatten(1).T.double()  # [rank, …]
    lossy = (_loss(rows) > _FP16_LOSS) | (_loss(columns) > _FP16_LOSS)
    if not lossy.any():
        return down, up
    ratio = columns.norm(dim=1) / rows.norm(dim=1)
    shifts = torch.where(lossy & (ratio > 0) & ratio.isfinite(), ratio.sqrt().log2().round().exp2(), 1.0).to(down.dtype)
    return down * shifts.view(-1, *[1] * (down.dim() - 1)), up / shifts.view(-1, *[1] * (up.dim() - 2))


def _loss(rows: Tensor) -> Tensor:
    """Return the relative error of each row in fp16, ∞ if it overflows."""
    error = (rows.half().double() - rows).norm(dim=1)
    return error / rows.norm(dim=1).clamp(min=1e-300)
