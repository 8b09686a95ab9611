"""Measures that compare images by their drawing, their kind of thing and their style."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from unziplora.errors import UserError, first_line
from unziplora.metrics.networks import SIDE, ShapeNet, StyleNet
from unziplora.metrics.statistics import Images, Statistics, unit_tensor

WEIGHTS = Path(__file__).with_name("weights")
BATCH = 64
"""Images that are embedded together."""


class Measure(Protocol):
    """Two embeddings of images; similar images are close to each other, by Euclidean distance or cosine."""

    def content(self, images: Images) -> Tensor:
        """Embed the content, whatever the style: [N, D], rows of unit length, on the CPU."""

    def style(self, images: Images) -> Tensor:
        """Embed the style, whatever the content: [N, D], rows of unit length, on the CPU."""


class CaseMeasure(Measure, Protocol):
    """Measure of the benchmark, with a third embedding for kinds of things.

    Optional: `weights_hash`, without which scores are reused by the measure's name alone; and `compare`, which takes
    embeddings of images [N, D] and of their truths [M, D] and returns N values, instead of the mean cosine.
    """

    name: str

    def concept(self, images: Images) -> Tensor:
        """Embed the kind of thing, any house like any other house: [N, D], rows of unit length, on the CPU."""


class Trained:
    """Small networks trained on drawings and filters; weights/README.md contains their accuracy."""

    name = "trained"

    def __init__(self, folder: Path = WEIGHTS) -> None:
        """Load `shape.safetensors` and `style.safetensors`.

        Raises:
            UserError: a file is missing or contains other weights.
        """
        self.weights_hash = hash_files(folder / "shape.safetensors", folder / "style.safetensors")
        self._shape, self._style = ShapeNet(), StyleNet()
        for net, name in ((self._shape, "shape"), (self._style, "style")):
            _load_weights(net, folder / f"{name}.safetensors")

    def content(self, images: Images) -> Tensor:
        """Embed the drawing, [N, 96]."""
        return _embed(lambda batch: self._shape(batch * 2 - 1)[0], images)

    def concept(self, images: Images) -> Tensor:
        """Embed the kind of thing, [N, 96]."""
        return _embed(lambda batch: self._shape(batch * 2 - 1)[1], images)

    def style(self, images: Images) -> Tensor:
        """Embed the style, [N, 64]."""
        return _embed(lambda batch: self._style(batch * 2 - 1), images)


def hash_files(*files: Path) -> str:
    """Return the first 16 hexadecimal digits of a hash of files; missing files are skipped."""
    sums = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()]
    return hashlib.sha256("".join(sums).encode()).hexdigest()[:16]


class Plain:
    """Edges, colors and textures, without a network; it does not recognize kinds of things."""

    name = "plain"

    def __init__(self) -> None:
        self._statistics = Statistics()

    def content(self, images: Images) -> Tensor:
        """Embed the layout of edges, [N, 512]."""
        return F.normalize(self._statistics.content(images), dim=1)

    def concept(self, images: Images) -> Tensor:
        """Embed the layout of edges, the closest substitute for the kind of thing, [N, 512]."""
        return self.content(images)

    def style(self, images: Images) -> Tensor:
        """Embed colors and textures, [N, 75]."""
        return F.normalize(self._statistics.style(images), dim=1)


def _load_weights(net: nn.Module, path: Path) -> None:
    try:
        net.load_state_dict({key: value.float() for key, value in load_file(path).items()})
    except Exception as error:  # safetensors and torch have errors of their own
        raise UserError(
            f"{path}: no weights of the benchmark's networks can be read from here ({first_line(error)}). Install "
            "unziplora again, or make them with python -m recipes.base.identity"
        ) from error
    net.eval().requires_grad_(False)


@torch.no_grad()
def _embed(network: Callable[[Tensor], Tensor], images: Images) -> Tensor:
    """Return rows of all images, [N, D]; the network receives batches [B, 3, SIDE, SIDE] in 0…1."""
    starts = range(0, len(images), BATCH)
    return torch.cat([network(unit_tensor(images[start : start + BATCH], SIDE)) for start in starts])
