"""Sheets of images, side by side in one PNG."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor


def to_pixels(batch: Tensor) -> NDArray[np.uint8]:
    """Convert images [N, 3, R, R] in -1..1 to uint8 [N, R, R, 3]."""
    scaled = (batch.detach().float().cpu().clamp(-1, 1) + 1) * 127.5
    return scaled.round().permute(0, 2, 3, 1).numpy().astype(np.uint8)


def sheet(rows: list[NDArray[np.uint8]], path: Path, zoom: int = 1) -> None:
    """Write rows of images, each uint8 [N, R, R, 3] of equal N, as one PNG."""
    pixels = np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0)
    image = Image.fromarray(pixels)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST).save(path)
