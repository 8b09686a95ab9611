"""Small networks that distinguish drawings, kinds of things and styles."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIDE = 64
"""Side in pixels of the networks' input images."""


def stage(before: int, channels: int) -> nn.Sequential:
    """Halve the image: a strided and a plain 3 × 3 convolution, each with group norm (arXiv 1803.08494) and SiLU."""
    return nn.Sequential(
        nn.Conv2d(before, channels, 3, 2, 1),
        nn.GroupNorm(8, channels),
        nn.SiLU(),
        nn.Conv2d(channels, channels, 3, 1, 1),
        nn.GroupNorm(8, channels),
        nn.SiLU(),
    )


class ShapeNet(nn.Module):
    """Embeddings of the drawing and of the kind of thing: one trunk and two heads that depend on position."""

    def __init__(self, width: int = 32, out: int = 96) -> None:
        super().__init__()
        widths = [3, width, 2 * width, 4 * width, 8 * width]
        self.trunk = nn.Sequential(*[stage(a, b) for a, b in itertools.pairwise(widths)])
        self.content, self.concept = (
            nn.Sequential(nn.Conv2d(widths[-1], 48, 1), nn.Flatten(), nn.Linear(48 * (SIDE // 16) ** 2, out))
            for _ in range(2)
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Embed images [N, 3, 64, 64] in −1…1 as content and concept, each [N, out], rows of unit length."""
        features = self.trunk(images)
        return F.normalize(self.content(features), dim=1), F.normalize(self.concept(features), dim=1)


class StyleNet(nn.Module):
    """Embedding of the style, independent of position: means and deviations of features (arXiv 1703.06868)."""

    def __init__(self, width: int = 24, out: int = 64) -> None:
        super().__init__()
        self.stages = nn.ModuleList([stage(3, width), stage(width, 2 * width), stage(2 * width, 4 * width)])
        self.head = nn.Sequential(nn.Linear(2 * (3 + 7 * width), 192), nn.SiLU(), nn.Linear(192, out))

    def forward(self, images: Tensor) -> Tensor:
        """Embed images [N, 3, 64, 64] in −1…1 as style, [N, out], rows of unit length."""
        features, moments = images, [*_moments(images)]
        for part in self.stages:
            features = part(features)
            moments += _moments(features)
        return F.normalize(self.head(torch.cat(moments, dim=1)), dim=1)


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation over positions, each [N, C]."""
    flat = features.flatten(2)
    return flat.mean(2), (flat.var(2, unbiased=False) + 1e-5).sqrt()
