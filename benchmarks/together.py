"""Steps of several trainings in one forward pass against one step after the other: `python benchmarks/together.py`.

Every training has LoRAs of its own in all attentions. In one pass, each image's rows go through its factors by batched
products. The base is the bundled one with random factors, fp32; times are medians of interleaved rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from unziplora.lora.inject import attention_linears
from unziplora.models.base import load_base

RANK = 2 * 16
"""Rank of a content and a style LoRA of the preset `bundled`, stacked as in training."""


class PerImage(nn.Module):
    """A frozen linear layer with LoRA factors for each of several trainings, whose rows follow each other."""

    def __init__(self, base: nn.Linear, trainings: int) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(trainings, base.in_features, RANK) / base.in_features)
        self.up = nn.Parameter(torch.randn(trainings, RANK, base.out_features) / RANK)

    def forward(self, x: Tensor) -> Tensor:
        """Map [trainings · N, tokens, in] to [trainings · N, tokens, out]."""
        own = x.reshape(len(self.down), -1, x.shape[-1])
        return self.base(x) + (own @ self.down @ self.up).view(*x.shape[:-1], -1)


def make_step(trainings: int, batch: int) -> Callable[[], None]:
    """Return a forward and backward pass of several trainings at once."""
    base = load_base("bundled")
    unet = base.unet.requires_grad_(False)
    for path in attention_linears(unet):
        parent, _dot, name = path.rpartition(".")
        layer = PerImage(unet.get_submodule(path), trainings)
        setattr(unet.get_submodule(parent), name, layer)
    rows, config = trainings * batch, unet.config
    sample = torch.randn(rows, config.in_channels, config.sample_size, config.sample_size)
    text = torch.randn(rows, 77, config.cross_attention_dim)
    pooled = unet.add_embedding.linear_1.in_features - 6 * config.addition_time_embed_dim
    added = {"text_embeds": torch.randn(rows, pooled), "time_ids": torch.full((rows, 6), 128.0)}

    def step() -> None:
        (made,) = unet(sample, torch.full((rows,), 500), text, added_cond_kwargs=added, return_dict=False)
        made.square().mean().backward()
        unet.zero_grad()

    return step


def main() -> None:
    """Print the seconds of one training's step, and of as many steps in one pass."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trainings", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    steps = {count: make_step(count, options.batch) for count in (1, *options.trainings)}
    seconds: dict[int, list[float]] = {count: [] for count in steps}
    for _ in range(options.rounds):
        for count, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[count].append(time.perf_counter() - start)
    medians = {count: statistics.median(times[2:]) for count, times in seconds.items()}
    for count, median in medians.items():
        print(f"{count} trainings: {median:.3f} s, {count * medians[1] / median:.2f} × the throughput")


if __name__ == "__main__":
    main()
