"""A frozen linear layer with any number of LoRA branches, each with its own input stream and column scale."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Factors = tuple[Tensor, Tensor]
"""A [R, in] and diag(columns) B [out, R] of LoRAs that read the same input, R the sum of their ranks."""

Observer = Callable[[Tensor, Tensor], None]

STREAMS = ("full", "content", "style")
"""Order of the prompts' embeddings on the feature axis of a joined [B, tokens, 3·D] conditioning."""


class Branch(nn.Module):
    """One LoRA of one linear layer: ΔW = strength · diag(mask ⊙ scale) B A (arXiv 2106.09685, 2412.04465).

    Attributes:
        down: A, [rank, in].
        up: B, [out, rank]; zeros at the start, so that ΔW = 0.
        scale: soft column scale m, [out], one per OUTPUT feature.
        mask: hard 0/1 column mask, [out]; ones when every column is open.
        strength: alpha / rank, times whatever dial is turned at inference.
        stream: which prompt's embedding this branch reads where the layer is given several joined ones.
    """

    scale: Tensor
    mask: Tensor

    def __init__(self, down: Tensor, up: Tensor, strength: float = 1.0, stream: str = "full") -> None:
        super().__init__()
        if down.shape[0] != up.shape[1]:
            raise ValueError(f"ranks differ: down {tuple(down.shape)}, up {tuple(up.shape)}")
        self.down = nn.Parameter(down)
        self.up = nn.Parameter(up)
        self.scale = nn.Parameter(torch.ones(up.shape[0], device=up.device))
        self.register_buffer("mask", torch.ones(up.shape[0], device=up.device))
        self.strength = strength
        self.stream = STREAMS.index(stream)
        # Set while columns are scored: called with (∂L/∂ΔW, ΔW), both [out, in] (see columns.py).
        self.observer: Observer | None = None

    def columns(self) -> Tensor:
        """Factor of each output column, strength · mask ⊙ scale, [out]."""
        columns = self.mask * self.scale
        return columns if self.strength == 1.0 else columns * self.strength

    def delta(self) -> Tensor:
        """The dense update ΔW = diag(columns) B A, [out, in], in fp32."""
        return (self.columns()[:, None] * self.up.float()) @ self.down.float()


class BranchedLinear(nn.Module):
    """y = W0 x₀ + b + Σ_i ΔW_i x_i: a frozen linear layer with LoRA branches that may read different inputs.

    Where the input is `n · in` features wide it is n prompts' embeddings joined on the feature axis
    (`STREAMS`): the frozen layer reads the first, each branch its own (arXiv 2412.04465). An
    input of the plain width is read by all. The products stay low-rank, and branches that read the same
    input are computed together: one product with the joined A, one with the joined, column-scaled B.
    """

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.branches = nn.ModuleDict()
        self.streams = 1  # prompts that the last input held
        # Computed for many layers at once (see factors.py), by the stream that they are multiplied with.
        self.factors: dict[int, Factors] | None = None

    def branch(self, name: str) -> Branch:
        """The branch of that name."""
        branch = self.branches[name]
        assert isinstance(branch, Branch)
        return branch

    @property
    def in_features(self) -> int:
        return self.base.in_features

    @property
    def out_features(self) -> int:
        return self.base.out_features

    def groups(self) -> dict[int, list[Branch]]:
        """The active branches by the stream that they read, without those that are observed."""
        groups: dict[int, list[Branch]] = {}
        for branch in map(self.branch, self.branches):
            if branch.strength and branch.observer is None:
                groups.setdefault(self.stream_of(branch), []).append(branch)
        return groups

    def stream_of(self, branch: Branch) -> int:
        """The prompt that a branch reads in an input like the last one."""
        return branch.stream if self.streams > 1 else 0

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] or [..., n·in] → [..., out]."""
        joined = x.shape[-1] > self.base.in_features  # a split has a cost of its own, also of one part
        streams = x.split(self.base.in_features, dim=-1) if joined else (x,)
        if len(streams) != self.streams:
            self.streams, self.factors = len(streams), None
        y = self.base(streams[0])
        for branch in map(self.branch, self.branches):
            if branch.observer is not None:
                y = y + _observed(streams[self.stream_of(branch)], branch).to(y.dtype)
        factors = self.factors
        if factors is None:
            factors = {stream: layer_factors(branches) for stream, branches in self.groups().items()}
        for stream, pair in factors.items():
            y = _add_low_rank(y, streams[stream], pair)
        return y


def _add_low_rank(y: Tensor, x: Tensor, factors: Factors) -> Tensor:
    """y + Σ_i (x A_iᵀ) (diag(columns_i) B_i)ᵀ for branches that read the same x, [..., out].

    The column factor goes into B, [out, rank], and the sum into the product: no second output in memory.
    """
    down, up = factors
    if x.dtype != up.dtype and not torch.is_autocast_enabled(x.device.type):
        down, up = down.to(x.dtype), up.to(x.dtype)
    inner = F.linear(x, down).flatten(0, -2)
    return torch.addmm(y.flatten(0, -2), inner, up.T).view(y.shape)


def _observed(x: Tensor, branch: Branch) -> Tensor:
    """x ΔWᵀ, [..., out], that shows (∂L/∂ΔW, ΔW) to the branch's observer during backward."""
    up = (branch.columns()[:, None] * branch.up).detach()
    # The branch's own parameter goes in so that there is a gradient to show even if x needs none.
    return _Observed.apply(x, branch.down.detach(), up, branch.up, branch.observer)


class _Observed(torch.autograd.Function):
    """x (B A)ᵀ; ΔW and its gradient exist during backward alone, for one layer at a time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, down: Tensor, up: Tensor, anchor: Tensor, observer: Observer) -> Tensor:
        ctx.save_for_backward(x, down, up)
        ctx.observer = observer
        return F.linear(F.linear(x, down.to(x.dtype)), up.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        x, down, up = ctx.saved_tensors
        (grad,) = grads
        ctx.observer(grad.flatten(0, -2).float().T @ x.flatten(0, -2).float(), up.float() @ down.float())
        return grad @ up.to(grad.dtype) @ down.to(grad.dtype), None, None, None, None


def layer_factors(branches: Sequence[Branch]) -> Factors:
    """The factors of one layer, whose branches may have any ranks and strengths."""
    down = torch.cat([branch.down for branch in branches])
    return down, torch.cat([branch.columns()[:, None] * branch.up for branch in branches], dim=1)
