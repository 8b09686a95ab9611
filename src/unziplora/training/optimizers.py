"""Optimizers and learning-rate schedules by their name in the configuration."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from unziplora.config.training import TrainingConfig
from unziplora.errors import UserError

Groups = list[dict[str, Any]]

_PACKAGES = {"prodigy": ("prodigyopt", "Prodigy"), "adamw8bit": ("bitsandbytes.optim", "AdamW8bit")}
"""Module and class of the optimizers that do not come with torch."""


def make_optimizers(groups: Groups, config: TrainingConfig) -> list[torch.optim.Optimizer]:
    """Create the optimizers of named parameter groups.

    Prodigy estimates one step size per optimizer, so each LoRA has its own. The column scales stay with AdamW, because
    their step depends on their range [0, 1] and not on the size of a gradient.

    Raises:
        UserError: the optimizer's package is not installed.
    """
    optimizer = find_optimizer(config.optimizer)
    if config.optimizer == "prodigy":
        options = {"betas": config.betas, "decouple": True, "use_bias_correction": True, "safeguard_warmup": True}
        matrices = [optimizer([group], **options) for group in groups if group["name"] != "scales"]
        return [*matrices, *(_adamw([group], config) for group in groups if group["name"] == "scales")]
    if config.optimizer == "adamw8bit":
        return [optimizer(groups, betas=config.betas)]
    return [_adamw(groups, config)]


def _adamw(groups: Groups, config: TrainingConfig) -> torch.optim.AdamW:
    # Fused, because a loop over the hundreds of small matrices of the LoRAs would cost as much as the UNet.
    # Not on Apple's GPUs, where a fused optimizer ignores an overflow that the loss scaler detected.
    fused = all(parameter.device.type != "mps" for group in groups for parameter in group["params"])
    return torch.optim.AdamW(groups, betas=config.betas, fused=fused)


def find_optimizer(kind: str) -> Callable[..., torch.optim.Optimizer]:
    """Return the class of an optimizer, or raise UserError if its package is not installed."""
    if kind not in _PACKAGES:
        return torch.optim.AdamW
    module, name = _PACKAGES[kind]
    package = module.partition(".")[0]
    try:
        return getattr(import_module(module), name)
    except Exception as error:  # bitsandbytes fails in many ways without CUDA
        raise UserError(
            f"optimizer needs {package}, which cannot be loaded ({error}): pip install {package}, or set "
            'optimizer = "adamw"'
        ) from None


def make_schedule(optimizer: torch.optim.Optimizer, kind: str, steps: int, warmup: int = 0) -> LambdaLR:
    """Create a schedule: constant, or cosine to zero at the last step, after a linear warm-up."""

    def factor(step: int) -> float:
        warm = min(1.0, (step + 1) / (warmup + 1))
        if kind == "constant":
            return warm
        done = max(0, step - warmup) / max(1, steps - warmup)
        return warm * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    return LambdaLR(optimizer, factor)
