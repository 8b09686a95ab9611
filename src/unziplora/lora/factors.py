"""Factors of all adapted layers of a UNet, computed together before each forward pass.

Stacking a layer's A's and column-scaled B's takes a dozen small operations, and as many in backward. With SDXL's 560
layers a GPU spends its time waiting for them, so layers of equal shape are computed at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from unziplora.lora.layer import Branch, BranchedLinear, Factors, layer_factors


class _ScaledRows(torch.autograd.Function):
    """diag(columns_i) B_i for columns [N, out] and N matrices B_i [out, r], [N, out, r]; saves no copy for backward."""

    @staticmethod
    def forward(ctx: Any, columns: Tensor, *ups: Tensor) -> Tensor:
        ctx.save_for_backward(columns, *ups)
        return torch.stack(ups) * columns[..., None]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        columns, *ups = ctx.saved_tensors
        (grad,) = grads
        columns_grad = (grad * torch.stack(ups)).sum(-1) if ctx.needs_input_grad[0] else None
        return columns_grad, *(grad * columns[..., None]).unbind()


def joint_factors(layers: Sequence[Sequence[Branch]], dtype: torch.dtype) -> list[Factors]:
    """Return the factors of several layers in a number format: A's [R, in] and diag(columns) B's [out, R] of each.

    All layers need the same shape, number of branches, rank and strengths.
    """
    count, branches = len(layers[0]), [branch for layer in layers for branch in layer]
    out, rank = branches[0].up.shape
    down = torch.cat([branch.down for branch in branches])
    scales: list[Tensor] = [branch.scale for branch in branches]
    strengths = [branch.strength for branch in branches]
    if any(strength != 1.0 for strength in strengths):
        # Multiply by Python numbers: a tensor of strengths would have to be copied to the GPU.
        scales = list(torch._foreach_mul(scales, strengths))
    columns = torch.stack([branch.mask for branch in branches]) * torch.stack(scales)
    up = _ScaledRows.apply(columns, *(branch.up for branch in branches))
    downs = down.to(dtype).view(len(layers), count * rank, -1).unbind()
    ups = up.to(dtype).view(len(layers), count, out, rank).transpose(1, 2).reshape(len(layers), out, -1).unbind()
    return list(zip(downs, ups, strict=True))


class JointFactors:
    """Hooks of a UNet that compute the factors of its adapted layers before a forward pass and discard them after it.

    With gradient checkpointing every layer computes its own, because factors in memory would undo what checkpointing
    saves.
    """

    def __init__(self, unet: nn.Module) -> None:
        self.layers: dict[str, BranchedLinear] = {}
        self.handles = (
            unet.register_forward_pre_hook(self.compute),
            unet.register_forward_hook(self.discard, always_call=True),
        )

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self.handles:
            handle.remove()

    def compute(self, unet: nn.Module, *_: Any) -> None:
        """Compute all factors; a layer whose input has another number of prompts than the last one computes its own."""
        if _checkpointing(unet):
            return
        alike: dict[Any, list[tuple[dict[int, Factors], int, list[Branch]]]] = {}
        for layer in self.layers.values():
            layer.factors = {}
            for stream, branches in layer.groups().items():
                if len({branch.up.shape for branch in branches}) > 1:
                    layer.factors[stream] = layer_factors(branches)
                    continue
                kind = (layer.in_features, branches[0].up.shape, *(branch.strength for branch in branches))
                key = (_dtype(layer.base.weight), branches[0].up.device, kind)
                alike.setdefault(key, []).append((layer.factors, stream, branches))
        for (dtype, _, _), entries in alike.items():
            places, streams, layers = zip(*entries, strict=True)
            for place, stream, factors in zip(places, streams, joint_factors(layers, dtype), strict=True):
                place[stream] = factors

    def discard(self, *_: Any) -> None:
        """Discard the factors, because weights may change until the next pass."""
        for layer in self.layers.values():
            layer.factors = None


def _dtype(weight: Tensor) -> torch.dtype:
    """Return the number format that an adapted layer computes in."""
    kind = weight.device.type
    reduced = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)  # not on the meta device
    return torch.get_autocast_dtype(kind) if reduced else weight.dtype


def _checkpointing(unet: nn.Module) -> bool:
    """Return whether a block uses gradient checkpointing; diffusers' own test visits thousands of modules."""
    blocks = (block for child in unet.children() for block in (child, *child.children()))
    return any(getattr(block, "gradient_checkpointing", False) for block in blocks)
