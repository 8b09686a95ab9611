"""What every method is made of: branches that start as LoRA does, encoded pictures, views for the sample sheet."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from unziplora.config.training import ImageConfig
from unziplora.lora.algebra import Pair, fold_output
from unziplora.lora.inject import add_lora, inject
from unziplora.lora.layer import Branch
from unziplora.training.loss import generator

Branches = dict[str, Branch]
"""The branches of one LoRA by module path."""


def new_branches(
    unet: nn.Module,
    name: str,
    paths: Iterable[str],
    config: ImageConfig,
    *,
    stream: str = "full",
    official_code: bool = False,
) -> Branches:
    """Add an untrained LoRA to a UNet's linear layers; its column scales are ones, and frozen."""
    modules = {}
    for path, layer in inject(unet, paths).items():
        draw = generator(config.seed, "init", name, path)
        modules[path] = initial_pair(layer.in_features, layer.out_features, config.rank, official_code, draw)
    branches = add_lora(unet, name, modules, (config.alpha or config.rank) / config.rank, stream)
    for branch in branches.values():
        branch.scale.requires_grad_(False)
    return branches


def initial_pair(in_features: int, out_features: int, rank: int, official_code: bool, draw: torch.Generator) -> Pair:
    """A LoRA's start: A [r, in] uniform in ±1/√in with B [out, r] zero, or both normal with std 1/r.

    The first is LoRA's (arXiv 2106.09685: ΔW = 0), the second that of UnZipLoRA's official code.
    """
    if official_code:
        shapes = (rank, in_features), (out_features, rank)
        down, up = (torch.randn(shape, generator=draw) / rank for shape in shapes)
        return down, up
    bound = 1 / math.sqrt(in_features)
    down = (torch.rand(rank, in_features, generator=draw) * 2 - 1) * bound
    return down, torch.zeros(out_features, rank)


def matrices(branches: Branches) -> list[nn.Parameter]:
    """The trained matrices A and B."""
    return [p for branch in branches.values() for p in (branch.down, branch.up)]


def branch_state(branches: Branches, prefix: str) -> dict[str, Tensor]:
    """A LoRA's tensors by name, for a checkpoint."""
    return {f"{prefix}.{path}.{key}": t for path, b in branches.items() for key, t in b.state_dict().items()}


def load_branch_state(branches: Branches, prefix: str, state: Mapping[str, Tensor]) -> None:
    """The inverse of `branch_state`."""
    for path, branch in branches.items():
        branch.load_state_dict({key: state[f"{prefix}.{path}.{key}"] for key in branch.state_dict()})


@torch.no_grad()
def folded(branches: Branches) -> dict[str, Pair]:
    """A LoRA as plain pairs (A [r, in], B [out, r]) of strength 1: masks, scales, alpha folded into B."""
    parts = {path: fold_output((b.down, b.up), b.columns()) for path, b in branches.items()}
    return {path: (down.cpu(), up.cpu()) for path, (down, up) in parts.items()}


@contextmanager
def switched_off(*loras: Branches) -> Iterator[None]:
    """Have LoRAs at strength 0 for a while."""
    branches = [branch for lora in loras for branch in lora.values()]
    strengths = [branch.strength for branch in branches]
    for branch in branches:
        branch.strength = 0.0
    try:
        yield
    finally:
        for branch, strength in zip(branches, strengths, strict=True):
            branch.strength = strength
