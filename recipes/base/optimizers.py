"""Optimizers of the stages: AdamW, and Muon with AdamW as one."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

OUTER = ("conv_in", "conv_out", "embedding")
"""Layers that read or write what is not hidden: Muon is meant for the matrices between them."""


def trainable(modules: dict[str, nn.Module]) -> list[nn.Parameter]:
    """Return the parameters of the modules that are trained."""
    return [p for module in modules.values() for p in module.parameters() if p.requires_grad]


def adamw(
    modules: dict[str, nn.Module],
    lr: float,
    weight_decay: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.99),
) -> torch.optim.AdamW:
    """Return fused AdamW over the trainable parameters of the modules."""
    return torch.optim.AdamW(trainable(modules), lr=lr, weight_decay=weight_decay, betas=betas, fused=True)


class MuonAdamW:
    """Optimizer of a module: Muon (Jordan 2024, "Muon: an optimizer for hidden layers") where it applies, else AdamW.

    Muon's steps are scaled to the size of AdamW's (arXiv 2502.16982, eq. 4), so both take the same learning rate. A
    convolution's kernel [out, in, h, w] counts as the matrix [out, in · h · w].
    """

    def __init__(self, module: nn.Module, lr: float, weight_decay: float = 0.01):
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        hidden = {name for name, p in named if p.ndim > 1 and not any(part in name for part in OUTER)}
        self.kernels = [p for name, p in named if name in hidden]
        self.matrices = [nn.Parameter(p.detach().flatten(1)) for p in self.kernels]  # share the kernels' memory
        rest = [p for name, p in named if name not in hidden]
        self.parts: tuple[torch.optim.Optimizer, ...] = (
            torch.optim.Muon(self.matrices, lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
            adamw({"rest": nn.ParameterList(rest)}, lr, weight_decay),
        )

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of both parts, for their learning rates."""
        return [group for part in self.parts for group in part.param_groups]

    def step(self) -> None:
        """Move all weights once."""
        for kernel, matrix in zip(self.kernels, self.matrices, strict=True):
            matrix.grad = None if kernel.grad is None else kernel.grad.flatten(1)
        for part in self.parts:
            part.step()

    def zero_grad(self) -> None:
        """Clear the gradients."""
        for part in self.parts:
            part.zero_grad()
        for kernel in self.kernels:
            kernel.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Return the state of both parts."""
        return {"muon": self.parts[0].state_dict(), "adamw": self.parts[1].state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of both parts."""
        for part, name in zip(self.parts, ("muon", "adamw"), strict=True):
            part.load_state_dict(state[name])
