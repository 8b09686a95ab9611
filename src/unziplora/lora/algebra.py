"""The algebra of LoRA pairs: ΔW = B A (arXiv 2106.09685), computed in fp32, without ΔW wherever it can.

A pair is (down, up) = (A, B) with A [rank, in] and B [out, rank]. Those of a convolution, A [rank, in,
kh, kw] and B [out, rank, 1, 1], are flattened for the computation and come back in their own shapes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]

_FP16_SMALL = 2.0**-10
"""Below this mean a part of a matrix lies where fp16 has fewer digits, under 6e-5."""


def _matrices(pair: Pair) -> Pair:
    """The pair as two fp32 matrices, A [rank, in·kh·kw] and B [out, rank]."""
    down, up = pair
    return down.float().flatten(1), up.float().flatten(1)


def _shaped(down: Tensor, up: Tensor, like: Pair) -> Pair:
    """Matrices of any rank in the shape (linear or convolution) of another pair."""
    return down.reshape(-1, *like[0].shape[1:]), up.reshape(up.shape[0], -1, *like[1].shape[2:])


def delta(pair: Pair) -> Tensor:
    """The dense update ΔW = B A in fp32, [out, in] or [out, in, kh, kw]."""
    down, up = _matrices(pair)
    return (up @ down).reshape(shape(pair))


def shape(pair: Pair) -> tuple[int, ...]:
    """The shape of ΔW, (out, in) or (out, in, kh, kw)."""
    down, up = pair
    return up.shape[0], *down.shape[1:]


def scale(pair: Pair, weight: float) -> Pair:
    """The pair of weight · ΔW."""
    return pair[0].float(), pair[1].float() * weight


def fold_output(pair: Pair, columns: Tensor) -> Pair:
    """The pair of diag(m) ΔW for a factor per output feature, m [out]: B · m[:, None] (arXiv 2412.04465)."""
    down, up = pair
    return down.float(), up.float() * columns.float().reshape(-1, *[1] * (up.dim() - 1))


def cat(pairs: Sequence[Pair]) -> Pair:
    """The pair of Σ ΔWᵢ, exactly: the factors joined along the rank, of rank Σ rᵢ."""
    return torch.cat([down.float() for down, _ in pairs], dim=0), torch.cat([up.float() for _, up in pairs], dim=1)


def norm(pair: Pair) -> float:
    """The Frobenius norm of ΔW, from the r × r Gram matrices: ‖B A‖² = ⟨BᵀB, A Aᵀ⟩."""
    down, up = _matrices(pair)
    return float(((up.T @ up) * (down @ down.T)).sum().clamp(min=0).sqrt())


def svd(pair: Pair) -> tuple[Tensor, Tensor, Tensor]:
    """The singular value decomposition of ΔW: U [out, k], s [k] falling, Vᵀ [k, in], k ≤ rank.

    By QR of both factors, B = Q_b R_b and Aᵀ = Q_a R_a, only R_b R_aᵀ [rank, rank] is decomposed, so the cost
    is O((out + in) rank²) and the dense matrix is never formed.
    """
    down, up = _matrices(pair)
    q_up, r_up = torch.linalg.qr(up)
    q_down, r_down = torch.linalg.qr(down.T)
    u, s, vh = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
    return q_up @ u, s, vh @ q_down.T


def resize(pair: Pair, rank: int | None = None, energy: float | None = None) -> Pair:
    """The best approximation of ΔW of a lower rank (Eckart–Young), singular values shared by both.

    Args:
        pair: the pair to approximate.
        rank: the most singular values to keep.
        energy: keep as few as hold this share of ‖ΔW‖², 0 < energy ≤ 1; at least one.
    """
    u, s, vh = svd(pair)
    keep = len(s) if rank is None else min(rank, len(s))
    if energy is not None:
        total = s.double().square().cumsum(0)
        # The last sum stands for all of it; a small tolerance keeps rounding from adding a useless direction.
        keep = min(keep, int((total < energy * total[-1] * (1 - 1e-9)).sum()) + 1)
    root = s[:keep].sqrt()
    return _shaped(root[:, None] * vh[:keep], u[:, :keep] * root, pair)


def balance(pair: Pair) -> Pair:
    """The same product, exactly, with a power of two moved from A to B where B is so small that fp16 loses digits.

    Such a B results from an alpha far below the rank that was folded into it, or of a short training.
    """
    down, up = pair
    size, small = (float(factor.detach().abs().mean()) for factor in pair)
    if not 0 < small < min(size, _FP16_SMALL):
        return pair
    shift = 2.0 ** math.floor(math.log2(size / small) / 2)
    return down / shift, up * shift
