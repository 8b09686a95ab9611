"""Which parts of a base are on the device: a GPU may not hold all of them beside what is computed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from unziplora.models.base import Base


@contextmanager
def moved_to(modules: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Have modules on a device for a while; they go back to where they were."""
    homes = [_device(module) for module in modules]
    try:
        for module in modules:
            module.to(device)
        yield
    finally:
        for module, home in zip(modules, homes, strict=True):
            module.to(home)


@contextmanager
def on_cpu(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Have modules that are on a GPU in the machine's memory for a while; others stay."""
    with moved_to([module for module in modules if _device(module).type == "cuda"], torch.device("cpu")):
        yield


@contextmanager
def base_on_cpu(base: Base) -> Iterator[None]:
    """Have a whole base off its GPU for a while: another one is trained on there."""
    with on_cpu([base.unet, base.vae, *base.text_encoders]):
        yield


@contextmanager
def text_encoders_ready(base: Base) -> Iterator[None]:
    """Have the text encoders on the base's device; if they must come for it, the UNet makes room for them."""
    absent = any(_device(encoder) != base.device for encoder in base.text_encoders)
    with on_cpu([base.unet] if absent else []), moved_to(base.text_encoders, base.device):
        yield


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
