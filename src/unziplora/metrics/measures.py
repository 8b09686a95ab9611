"""What the benchmark compares pictures by: which drawing, which kind of thing, which style."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from unziplora.errors import UserError, first_line
from unziplora.metrics.networks import SIDE, ShapeNet, StyleNet
from unziplora.metrics.statistics import Statistics, unit_tensor

Pictures = Sequence[Image.Image]
WEIGHTS = Path(__file__).with_name("weights")
BATCH = 64
"""Pictures of 64 pixels a side that are embedded together; fewer of larger ones."""


class Measure(Protocol):
    """Three views of pictures; in each, alike means a cosine near 1.

    Attributes:
        name: how figures are called.
        mark: differs where the weights do; may be lacking where there are none.
    """

    name: str

    def content(self, pictures: Pictures) -> Tensor:
        """Which drawing is shown, whatever the style: [N, D], rows of unit length, on the CPU."""

    def concept(self, pictures: Pictures) -> Tensor:
        """Which kind of thing is shown, any house like any other house: [N, D], rows of unit length, on the CPU."""

    def style(self, pictures: Pictures) -> Tensor:
        """How it is drawn, whatever is shown: [N, D], rows of unit length, on the CPU."""


class Trained:
    """Small networks trained for this world of drawings and filters; see weights/README.md for what they can tell."""

    name = "trained"

    def __init__(self, folder: Path = WEIGHTS) -> None:
        """Load `shape.safetensors` and `style.safetensors`.

        Raises:
            UserError: a file is missing or holds other weights.
        """
        self.mark = fingerprint_of(folder / "shape.safetensors", folder / "style.safetensors")
        self._shape, self._style = ShapeNet(), StyleNet()
        for net, name in ((self._shape, "shape"), (self._style, "style")):
            _fill(net, folder / f"{name}.safetensors")

    def content(self, pictures: Pictures) -> Tensor:
        """[N, 96]."""
        return _batched(lambda batch: self._shape(batch * 2 - 1)[0], pictures, SIDE)

    def concept(self, pictures: Pictures) -> Tensor:
        """[N, 96]."""
        return _batched(lambda batch: self._shape(batch * 2 - 1)[1], pictures, SIDE)

    def style(self, pictures: Pictures) -> Tensor:
        """[N, 64]."""
        return _batched(lambda batch: self._style(batch * 2 - 1), pictures, SIDE)


def fingerprint_of(*files: Path) -> str:
    """Sixteen digits that differ where the files do; nothing of one that is not there."""
    sums = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()]
    return hashlib.sha256("".join(sums).encode()).hexdigest()[:16]


class Plain:
    """Without a network: the layout of edges, colors and textures; it knows no kinds of things."""

    name = "plain"

    def __init__(self) -> None:
        self._statistics = Statistics()

    def content(self, pictures: Pictures) -> Tensor:
        """Layout of edges, [N, 512]."""
        return F.normalize(self._statistics.content(pictures), dim=1)

    def concept(self, pictures: Pictures) -> Tensor:
        """The same as content: what comes nearest without knowing things, [N, 512]."""
        return self.content(pictures)

    def style(self, pictures: Pictures) -> Tensor:
        """Colors and textures, [N, 75]."""
        return F.normalize(self._statistics.style(pictures), dim=1)


def _fill(net: nn.Module, path: Path) -> None:
    try:
        net.load_state_dict({key: value.float() for key, value in load_file(path).items()})
    except Exception as error:  # safetensors and torch have errors of their own
        raise UserError(
            f"{path}: no weights of the benchmark's networks can be read from here ({first_line(error)}). Install "
            "unziplora anew, or make them with python -m recipes.base.identity"
        ) from error
    net.eval().requires_grad_(False)


@torch.no_grad()
def _batched(embed: Callable[[Tensor], Tensor], pictures: Pictures, side: int) -> Tensor:
    """Rows of all pictures, [N, D]; `embed` sees batches [B, 3, side, side] in 0…1."""
    count = max(1, BATCH * SIDE**2 // side**2)  # batches of equal size in pixels stay in the cache
    starts = range(0, len(pictures), count)
    return torch.cat([embed(unit_tensor(pictures[start : start + count], side)) for start in starts])
