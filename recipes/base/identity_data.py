"""Training images of the identity networks: many drawings, each in several styles, and variants of the styles.

A style is a filter with one fixed rendering, or a drawing set as it is. A *grade* (other paper, pigments and texture)
makes another style of it.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from torch import Tensor

from recipes.base.config import Recipe
from recipes.base.dataset import Images, stored_images
from recipes.base.filters import FILTERS, rendered
from recipes.base.filters.common import Pixels
from recipes.base.sheets import to_pixels
from recipes.base.vae import to_tensor
from recipes.base.world import FREE_LICENSES, NEVER_FILTERS, NEVER_SETS, Item, World
from unziplora.metrics.measures import hash_files

VARIANTS = 3
"""Fixed random states per filter. Every drawing shares them, as a series of prints shares its paper and ink."""
FILTERS_EACH = 5
"""Filters per drawing."""
SOFT = 0.35
"""Share of the images that are added again, as the autoencoder of the bundled base reconstructs them."""


def open_world(recipe: Recipe) -> World:
    """Open the world with every concept that may be trained on."""
    return World(recipe.world.model_copy(update={"concepts": "all"}))


def natural_sets(world: World) -> list[str]:
    """Return the freely licensed drawing sets that are not reserved for tests."""
    return [k for k, s in world.sets.items() if k not in NEVER_SETS and s["licence"].startswith(FREE_LICENSES)]


def plan(world: World, filters: list[str], each: int, seed: int) -> Iterator[Item]:
    """Yield every drawing of the recipe's sets in `each` random filters, one rendering of each."""
    rng = np.random.default_rng(seed)
    for concept in world.trained_concepts:
        for drawing in world.settings.drawings:
            if world.has(drawing, concept):
                for name in rng.choice(filters, min(each, len(filters)), replace=False):
                    yield Item(concept, drawing, str(name), str(name), int(rng.integers(VARIANTS)))


def natural(world: World) -> Iterator[Item]:
    """Yield every drawing of the free sets as it is; the set is its style."""
    for drawing in natural_sets(world):
        for concept in world.trained_concepts:
            if world.has(drawing, concept):
                yield Item(concept, drawing, drawing, natural=True)


def render(world: World, item: Item) -> Pixels:
    """Render an image uint8 [R, R, 3]; all drawings of a variant share the filter's random state."""
    rng = np.random.default_rng(zlib.crc32(f"{item.filter}|{item.variant}".encode()))
    return rendered(world.drawing(item.drawing, item.concept), item.filter, rng, world.settings.resolution)


@torch.no_grad()
def soften(pixels: Pixels, vae: AutoencoderTiny) -> Pixels:
    """Reconstruct images with an autoencoder, which makes them as soft as the samples of a base."""
    parts = []
    for start in range(0, len(pixels), 32):
        latents = vae.encode(to_tensor(pixels[start : start + 32], vae.device)).latents
        parts.append(to_pixels(vae.decode(latents).sample))
    return np.concatenate(parts)


def _complete(world: World, items: list[Item], vae: AutoencoderTiny, seed: int) -> Images:
    pixels = np.stack([render(world, item) for item in items])
    chosen = np.random.default_rng(seed).permutation(len(items))[: round(SOFT * len(items))]
    return Images(np.concatenate([pixels, soften(pixels[chosen], vae)]), items + [items[i] for i in chosen])


def natural_and_filtered(recipe: Recipe, vae_folder: Path) -> Images:
    """Return all images to learn from, rendered once and stored."""

    def make() -> Images:
        world, known = open_world(recipe), [name for name in FILTERS if name not in NEVER_FILTERS]
        vae = AutoencoderTiny.from_pretrained(vae_folder, torch_dtype=torch.float32)
        items = [*natural(world), *plan(world, known, FILTERS_EACH, recipe.seed)]
        return _complete(world, items, vae, recipe.seed)

    other = [recipe.seed, VARIANTS, FILTERS_EACH, SOFT, hash_files(*sorted(vae_folder.glob("*.safetensors")))]
    return stored_images(recipe.output / "pictures.npy", recipe.world, other, make)


def disturb(pixels: Tensor, rng: np.random.Generator) -> Tensor:
    """Move, scale, soften and roughen images [N, 3, R, R], so that no measure relies on position or sharpness."""
    count, size = len(pixels), pixels.shape[-1]
    scale = torch.from_numpy(rng.uniform(0.88, 1.1, count)).float()
    moves = torch.from_numpy(rng.uniform(-0.12, 0.12, (count, 2))).float()
    rows = torch.zeros(count, 2, 3)
    rows[:, 0, 0] = rows[:, 1, 1] = scale
    rows[:, :, 2] = moves
    grid = F.affine_grid(rows, [count, 3, size, size], align_corners=False)
    moved = F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    soft = F.avg_pool2d(F.pad(moved, (1, 1, 1, 1), mode="replicate"), 3, 1)
    share = torch.from_numpy(rng.uniform(0, 0.7, count) * (rng.random(count) < 0.4)).float()[:, None, None, None]
    strength = torch.from_numpy(rng.uniform(0, 0.08, count)).float()[:, None, None, None]
    return moved + share * (soft - moved) + strength * torch.randn_like(moved)
