"""Frozen layers with any number of LoRA branches, each with its own column scale and, if linear, input stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional as F

from unziplora.lora.algebra import delta

Factors = tuple[Tensor, Tensor]
"""Stacked A's [R, in] and diag(columns) B's [out, R] of branches that read the same input; R is the sum of ranks."""

Observer = Callable[[Tensor, Tensor], None]
"""A function that receives (∂L/∂ΔW, ΔW) of one branch, both [out, in], in every backward pass."""

STREAMS = ("full", "content", "style")
"""Prompts in the order of their embeddings on the feature axis of a joined conditioning [B, tokens, 3·D]."""


class Branch(nn.Module):
    """One LoRA of one layer: ΔW = strength · diag(mask ⊙ scale) B A (arXiv 2106.09685, 2412.04465).

    Attributes:
        down: A, [rank, in], of a convolution [rank, in, kh, kw].
        up: B, [out, rank], of a convolution [out, rank, 1, 1]. A new LoRA starts with zeros, so that ΔW = 0.
        scale: soft column scale, [out], one factor per output feature.
        mask: hard column mask, [out], 0 or 1; all ones if every column trains.
        strength: alpha / rank, times the strength set at inference.
        stream: index in `STREAMS` of the prompt whose embedding the branch reads in a joined conditioning.
        observer: if set, receives (∂L/∂ΔW, ΔW) during backward. UnZipLoRA scores columns with it. An observed branch
            gets no gradients of its own.
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
        self.observer: Observer | None = None

    def columns(self) -> Tensor:
        """Return the factor of each column, strength · mask ⊙ scale, [out]."""
        columns = self.mask * self.scale
        return columns if self.strength == 1.0 else columns * self.strength

    def scaled_up(self) -> Tensor:
        """Return diag(columns) B, in the shape of B."""
        return self.columns().view(-1, *[1] * (self.up.dim() - 1)) * self.up

    def delta(self) -> Tensor:
        """Return the dense update ΔW = diag(columns) B A in fp32, [out, in] or [out, in, kh, kw]."""
        return delta((self.down, self.scaled_up()))


class LayerGroup(Protocol):
    """The adapted layers of one UNet by module path, which share what is computed once per forward pass."""

    layers: dict[str, BranchedLinear]

    def detach(self) -> None:
        """Remove what the group has added to the UNet."""


class AdaptedLayer(nn.Module):
    """A frozen layer, `base`, with LoRA branches by name; adapters of PEFT that others added to it stay in `base`."""

    def __init__(self, base: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        self.base = base
        self.branches = nn.ModuleDict()

    def branch(self, name: str) -> Branch:
        """Return a branch by name."""
        branch = self.branches[name]
        assert isinstance(branch, Branch)
        return branch


class BranchedLinear(AdaptedLayer):
    """A frozen linear layer with LoRA branches: y = W0 x₀ + b + Σ_i ΔW_i x_i.

    An input of `n · in` features is n prompts' embeddings joined on the feature axis (`STREAMS`). The frozen layer
    reads the first and each branch its own (arXiv 2412.04465). An input of `in` features is read by all.

    ΔW_i is never formed. Branches with the same input are computed together: one product with their stacked A's, one
    with their stacked, column-scaled B's.

    Attributes:
        streams: number of prompts in the last input.
        group: the adapted layers of the same UNet, this one among them.
        factors: factors by stream, if the group has computed them for this forward pass.
    """

    base: nn.Linear

    def __init__(self, base: nn.Linear, group: LayerGroup) -> None:
        super().__init__(base)
        self.group = group
        self.streams = 1
        self.factors: dict[int, Factors] | None = None

    @property
    def in_features(self) -> int:
        return self.base.in_features

    @property
    def out_features(self) -> int:
        return self.base.out_features

    def groups(self) -> dict[int, list[Branch]]:
        """Return the branches that add to the output by the stream they read, without the observed ones."""
        groups: dict[int, list[Branch]] = {}
        for branch in map(self.branch, self.branches):
            if branch.strength and branch.observer is None:
                groups.setdefault(self.stream_of(branch), []).append(branch)
        return groups

    def stream_of(self, branch: Branch) -> int:
        """Return the index of the prompt that a branch reads in an input like the last one."""
        return branch.stream if self.streams > 1 else 0

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in] or [..., n·in] to [..., out]."""
        joined = x.shape[-1] > self.base.in_features  # splitting into one part would cost time too
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
    """Return y + Σ_i (x A_iᵀ) (diag(columns_i) B_i)ᵀ, [..., out], for branches that read the same x.

    The columns' factors are part of B, and the sum part of the product, so no second output takes memory.
    """
    down, up = factors
    if x.dtype != up.dtype and not torch.is_autocast_enabled(x.device.type):
        down, up = down.to(x.dtype), up.to(x.dtype)
    inner = F.linear(x, down).flatten(0, -2)
    return torch.addmm(y.flatten(0, -2), inner, up.T).view(y.shape)


def _observed(x: Tensor, branch: Branch) -> Tensor:
    """Return x ΔWᵀ, [..., out], and have backward call the branch's observer with (∂L/∂ΔW, ΔW)."""
    up = (branch.columns()[:, None] * branch.up).detach()
    # The branch's parameter is an argument so that backward runs even if x needs no gradient.
    return _Observed.apply(x, branch.down.detach(), up, branch.up, branch.observer)


class _Observed(torch.autograd.Function):
    """x (B A)ᵀ with dense ΔW and ∂L/∂ΔW in backward only, so that they take memory for one layer at a time."""

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


class BranchedConv(AdaptedLayer):
    """A frozen convolution with LoRA branches: y = W0 ∗ x + b + Σ_i B_i (A_i ∗ x) (LoCon, arXiv 2309.14859).

    A convolution reads no prompt, so all branches have the same input. Each has the stride and the padding of W0.
    """

    base: nn.Conv2d

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, in, h, w] to [B, out, h', w']."""
        frozen = beneath_adapters(self.base)
        assert isinstance(frozen, nn.Conv2d)
        y = self.base(x)
        branches = [branch for branch in map(self.branch, self.branches) if branch.strength]
        if not branches:
            return y
        down, up = (factor.to(x.dtype) for factor in layer_factors(branches))
        inner = F.conv2d(x, down, None, frozen.stride, frozen.padding, frozen.dilation)
        return y + F.conv2d(inner, up)


def beneath_adapters(layer: nn.Module) -> nn.Module:
    """Return a layer without the adapters of PEFT around it."""
    return layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer


def layer_factors(branches: Sequence[Branch]) -> Factors:
    """Return the factors of one layer, whose branches may have any ranks and strengths."""
    down = torch.cat([branch.down for branch in branches])
    return down, torch.cat([branch.scaled_up() for branch in branches], dim=1)
