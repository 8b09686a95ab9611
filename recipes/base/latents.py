"""Latents of a recipe's images: encoded once and stored next to the images."""

from __future__ import annotations

import hashlib
import json
import os

import numpy as np
import torch
from diffusers import AutoencoderTiny
from torch import Tensor

from recipes.base.config import Recipe
from recipes.base.grades import grade_all
from recipes.base.vae import to_tensor

PART = 1024
"""Images per stored file; a multiple of the 256 images that `grade_all` grades at once."""


@torch.no_grad()
def encode_images(vae: AutoencoderTiny, pixels: np.ndarray, device: torch.device) -> Tensor:
    """Encode images uint8 [N, R, R, 3] as scaled latents [N, C, h, w]."""
    parts = [pixels[i : i + 64] for i in range(0, len(pixels), 64)]
    latents = torch.cat([vae.encode(to_tensor(part, device)).latents for part in parts])
    return latents.float() * vae.config.scaling_factor


def stored_latents(
    recipe: Recipe, vae: AutoencoderTiny, pixels: np.ndarray, graded: bool, device: torch.device
) -> tuple[Tensor, list[str]]:
    """Return latents of images uint8 [N, R, R, 3], then of graded copies if `graded`, and the words of their papers.

    Latents are stored in parts, so that a resumed stage starts at once and a stopped one keeps its finished parts.
    Other images, another encoder or another seed use another folder.
    """
    digest = hashlib.sha256(f"{recipe.seed} {pixels.shape} {vae.config.scaling_factor}".encode())
    digest.update(np.ascontiguousarray(pixels))
    for tensor in vae.encoder.state_dict().values():
        digest.update(tensor.cpu().contiguous().numpy())
    folder = recipe.output / "latents" / digest.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    latents: list[Tensor] = []
    papers: list[str] = []
    for kind in ("plain", "graded") if graded else ("plain",):
        for start in range(0, len(pixels), PART):
            file = folder / f"{kind}-{start:06d}.npy"
            words = file.with_suffix(".json")
            if not file.exists():
                part = pixels[start : start + PART]
                if kind == "graded":
                    part, names = grade_all(part, recipe.seed, recipe.threads, first=start)
                    words.write_text(json.dumps(names))
                temporary = file.with_suffix(".tmp.npy")
                np.save(temporary, encode_images(vae, part, device).cpu().numpy())
                os.replace(temporary, file)
            latents.append(torch.from_numpy(np.load(file)))
            if kind == "graded":
                papers += json.loads(words.read_text())
    return torch.cat(latents).to(device), papers
