"""Temporary device placement: a GPU may be too small for all parts of a base next to what is computed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from unziplora.models.base import Base


@contextmanager
def moved_to(modules: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Temporarily move modules to a device; each returns to where it was."""
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
    """Temporarily move modules from a GPU to the CPU; modules elsewhere stay."""
    with moved_to([module for module in modules if _device(module).type == "cuda"], torch.device("cpu")):
        yield


@contextmanager
def base_on_cpu(base: Base) -> Iterator[None]:
    """Temporarily move a whole base off its GPU, where another one is trained."""
    with on_cpu([base.unet, base.vae, *base.text_encoders]):
        yield


@contextmanager
def base_at_work(base: Base) -> Iterator[None]:
    """Temporarily move a whole base that waits on the CPU to the device where it computes, and free that again."""
    try:
        with moved_to([base.unet, base.vae, *base.text_encoders], base.device):
            yield
    finally:
        if base.device.type == "cuda":
            torch.cuda.empty_cache()


@contextmanager
def text_encoders_ready(base: Base) -> Iterator[None]:
    """Prepare a base for encoding prompts: text encoders that are elsewhere come, and then the UNet makes room."""
    absent = any(_device(encoder) != base.device for encoder in base.text_encoders)
    with on_cpu([base.unet] if absent else []), moved_to(base.text_encoders, base.device):
        yield


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
