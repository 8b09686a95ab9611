"""Features of content and style without a network."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

Images = Sequence[Image.Image]


class Statistics:
    """Layout of edges for content; colors and textures for style.

    Content: squared gradients of the gray image, scaled to mean 0 and variance 1, in 8 orientations (light on dark
    counts as dark on light) over 8 × 8 cells, as in histograms of oriented gradients (Dalal and Triggs, 2005).
    Style: means, spreads, skewness and correlations of the colors, and how strongly oriented edges, spots
    and colored edges occur together at three scales (after the Gram matrices of Gatys et al., 2016).
    """

    orientations = 8
    cells = 8
    scales = 3

    def content(self, images: Images) -> Tensor:
        """Return the layout of edges, [N, orientations · cells²]."""
        colors = unit_tensor(images, 8 * self.cells)
        gray = F.avg_pool2d(F.pad(_opponent(colors)[:, :1], (1, 1, 1, 1), mode="replicate"), 3, 1)
        gray = gray - gray.mean((2, 3), keepdim=True)
        gray = gray / (gray.std((2, 3), keepdim=True) + 1e-3)
        across, down = _gradients(gray)
        angle = torch.atan2(down, across)
        centers = torch.arange(self.orientations).view(1, -1, 1, 1) * math.pi / self.orientations
        share = torch.cos(2 * (angle - centers)).clamp(min=0) * (across.square() + down.square())
        return F.normalize(F.avg_pool2d(share, 8).sqrt().flatten(1), dim=1)

    def style(self, images: Images) -> Tensor:
        """Return colors and textures with equal weight, [N, 12 + scales · 21]."""
        planes = _opponent(unit_tensor(images, 128))
        colors = F.normalize(_moments(planes), dim=1)
        textures = []
        for _ in range(self.scales):
            textures.append(_cooccurrence(planes))
            planes = F.avg_pool2d(planes, 2)
        return torch.cat([colors, F.normalize(torch.cat(textures, dim=1), dim=1)], dim=1) / math.sqrt(2)


def unit_tensor(images: Images, side: int) -> Tensor:
    """Convert images to squares of `side` pixels, [N, 3, side, side] in 0…1."""
    squares = [image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC) for image in images]
    return torch.stack([_bytes(square).view(side, side, 3).permute(2, 0, 1) for square in squares]).float() / 255


def _bytes(image: Image.Image) -> Tensor:
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)


def _opponent(colors: Tensor) -> Tensor:
    """Return light, red against green, blue against yellow, [N, 3, H, W], roughly in −1…1."""
    red, green, blue = colors.unbind(1)
    return torch.stack([(red + green + blue) / 1.5 - 1, red - green, blue - (red + green) / 2], dim=1)


def _gradients(planes: Tensor) -> tuple[Tensor, Tensor]:
    """Return central differences across and down, each of the planes' shape."""
    padded = F.pad(planes, (1, 1, 1, 1), mode="replicate")
    return padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2], padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]


def _moments(planes: Tensor) -> Tensor:
    """Return mean, spread and cube root of the third moment per plane, and the three covariances, [N, 12]."""
    flat = planes.flatten(2)
    centered = flat - flat.mean(2, keepdim=True)
    third = centered.pow(3).mean(2)
    covariance = centered @ centered.transpose(1, 2) / flat.shape[2]
    spread = covariance.diagonal(dim1=1, dim2=2).sqrt()
    off = covariance[:, [0, 0, 1], [1, 2, 2]]
    return torch.cat([flat.mean(2), spread, third.sign() * third.abs().pow(1 / 3), _root(off)], dim=1)


def _cooccurrence(planes: Tensor) -> Tensor:
    """Return the root of mean products of 6 magnitudes: edges in four directions, spots, colored edges, [N, 21]."""
    across, down = _gradients(planes)
    light, right = across[:, :1], down[:, :1]
    diagonals = [(light + right) / math.sqrt(2), (light - right) / math.sqrt(2)]
    blurred = F.avg_pool2d(F.pad(planes[:, :1], (1, 1, 1, 1), mode="replicate"), 3, 1)
    colored = (across[:, 1:].square() + down[:, 1:].square()).sum(1, keepdim=True).sqrt()
    magnitudes = torch.cat([light, right, *diagonals, planes[:, :1] - blurred, colored], dim=1).abs().flatten(2)
    gram = magnitudes @ magnitudes.transpose(1, 2) / magnitudes.shape[2]
    upper = torch.triu_indices(6, 6)
    return gram[:, upper[0], upper[1]].sqrt()


def _root(values: Tensor) -> Tensor:
    return values.sign() * values.abs().sqrt()
