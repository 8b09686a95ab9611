"""Images between ComfyUI's tensors and PNG files."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from unziplora.utils.files import write_png


def to_pil(image: Tensor) -> Image.Image:
    """Convert one image of a batch, [H, W, 3] in 0…1, without an alpha channel."""
    pixels = image[..., :3].detach().float().cpu().numpy()
    return Image.fromarray(np.clip(pixels * 255 + 0.5, 0, 255).astype(np.uint8))


def store_inputs(images: Tensor, folder: Path) -> list[Path]:
    """Write a batch of images as PNG files named by their content, and return their paths."""
    paths = []
    for image in map(to_pil, images):
        path = folder / f"{hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()[:16]}.png"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_png(path, image)
        paths.append(path)
    return paths
