"""The factors of all adapted layers of a UNet, computed together before each of its forward passes.

What a layer multiplies with, A's joined and column-scaled B's joined, takes a dozen small operations and as many again
backwards. For SDXL's 560 layers it is these that a GPU waits for. Of layers of one shape they are computed at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from unziplora.lora.layer import Branch, BranchedLinear, Factors, layer_factors


class _ScaledRows(torch.autograd.Function):
    """diag(columns_i) B_i of N matrices, [N, out, r]; keeps no copy of them for the backward pass."""

    @staticmethod
    def forward(ctx: Any, columns: Tensor, *ups: Tensor) -> Tensor:
        ctx.save_for_backward(columns, *ups)
        return torch.stack(ups) * columns[..., None]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        columns, *ups = ctx.saved_tensors
        (grad,) = grads
        wanted = (grad * torch.stack(ups)).sum(-1) if ctx.needs_input_grad[0] else None
        return wanted, *(grad * columns[..., None]).unbind()


def joint_factors(layers: Sequence[Sequence[Branch]], dtype: torch.dtype) -> list[Factors]:
    """The factors of layers of one shape, each with equally many branches, of one rank and at the same strengths.

    Args:
        layers: the branches of each layer that read the same input.
        dtype: of the factors.
    """
    count, branches = len(layers[0]), [branch for layer in layers for branch in layer]
    out, rank = branches[0].up.shape
    down = torch.cat([branch.down for branch in branches])
    scales: list[Tensor] = [branch.scale for branch in branches]
    strengths = [branch.strength for branch in branches]
    if any(strength != 1.0 for strength in strengths):
        # By numbers: a tensor of them would have to be brought to the GPU.
        scales = list(torch._foreach_mul(scales, strengths))
    columns = torch.stack([branch.mask for branch in branches]) * torch.stack(scales)
    up = _ScaledRows.apply(columns, *(branch.up for branch in branches))
    downs = down.to(dtype).view(len(layers), count * rank, -1).unbind()
    ups = up.to(dtype).view(len(layers), count, out, rank).transpose(1, 2).reshape(len(layers), out, -1).unbind()
    return list(zip(downs, ups, strict=True))


class JointFactors:
    """Hooks of a UNet that give its adapted layers their factors for the time of a forward pass.

    With gradient checkpointing every layer makes its own: kept, they would take the memory that it is to save.

    Attributes:
        layers: the adapted layers by module path.
    """

    def __init__(self, unet: nn.Module) -> None:
        self.layers: dict[str, BranchedLinear] = {}
        self.handles = (
            unet.register_forward_pre_hook(self.compute),
            unet.register_forward_hook(self.discard, always_call=True),
        )

    def detach(self) -> None:
        """Take the hooks off: every layer makes its own factors."""
        for handle in self.handles:
            handle.remove()

    def compute(self, unet: nn.Module, *_: Any) -> None:
        """Compute the factors; a layer that finds another number of prompts than last time still makes its own."""
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
        """Weights may change until the next pass."""
        for layer in self.layers.values():
            layer.factors = None


def _dtype(weight: Tensor) -> torch.dtype:
    """What an adapted layer computes in."""
    kind = weight.device.type
    reduced = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)  # not on the meta device
    return torch.get_autocast_dtype(kind) if reduced else weight.dtype


def _checkpointing(unet: nn.Module) -> bool:
    """Whether any of the UNet's blocks is computed twice; diffusers' own answer walks through thousands of modules."""
    blocks = (block for child in unet.children() for block in (child, *child.children()))
    return any(getattr(block, "gradient_checkpointing", False) for block in blocks)
