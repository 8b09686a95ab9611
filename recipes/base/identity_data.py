"""Pictures for learning who is who: many drawings, each in several styles, and endless variants of the styles.

A style is a filter with one fixed rendering, or a drawing set as it is; on top comes a *grade* (other paper, other
pigments, another texture), so that another rendering of watercolour is another style.
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
from recipes.base.dataset import Pictures, kept
from recipes.base.filters import FILTERS, rendered
from recipes.base.filters.common import Picture
from recipes.base.sheets import to_pixels
from recipes.base.vae import to_tensor
from recipes.base.world import FREE_LICENCES, NEVER_FILTERS, NEVER_SETS, Item, World
from unziplora.metrics.measures import hash_files

VARIANTS = 3
"""Fixed random states per filter: the same for every drawing, as paper and ink are the same for a series."""
FILTERS_EACH = 5
"""Filters that each drawing is rendered in."""
SOFT = 0.35
"""Pictures that are added once more as the autoencoder of the bundled base paints them, as a share."""


def open_world(recipe: Recipe) -> World:
    """The world with every concept that may be trained on."""
    return World(recipe.world.model_copy(update={"concepts": "all"}))


def natural_sets(world: World) -> list[str]:
    """The freely licensed drawing sets that are not kept for tests."""
    return [k for k, s in world.sets.items() if k not in NEVER_SETS and s["licence"].startswith(FREE_LICENCES)]


def plan(world: World, filters: list[str], each: int, seed: int) -> Iterator[Item]:
    """Every drawing of the recipe's sets in `each` filters at random, one rendering of each."""
    rng = np.random.default_rng(seed)
    for concept in world.trained_concepts:
        for drawing in world.settings.drawings:
            if world.has(drawing, concept):
                for name in rng.choice(filters, min(each, len(filters)), replace=False):
                    yield Item(concept, drawing, str(name), str(name), int(rng.integers(VARIANTS)))


def natural(world: World) -> Iterator[Item]:
    """Every drawing of the free sets as it is; the set is its style."""
    for drawing in natural_sets(world):
        for concept in world.trained_concepts:
            if world.has(drawing, concept):
                yield Item(concept, drawing, drawing, natural=True)


def render(world: World, item: Item) -> Picture:
    """A picture uint8 [R, R, 3]; the filter's random state is the same for every drawing of a variant."""
    rng = np.random.default_rng(zlib.crc32(f"{item.filter}|{item.variant}".encode()))
    return rendered(world.drawing(item.drawing, item.concept), item.filter, rng, world.settings.resolution)


@torch.no_grad()
def soften(pixels: Picture, vae: AutoencoderTiny) -> Picture:
    """Pictures as an autoencoder paints them: as soft as what a base generates."""
    parts = []
    for start in range(0, len(pixels), 32):
        latents = vae.encode(to_tensor(pixels[start : start + 32], vae.device)).latents
        parts.append(to_pixels(vae.decode(latents).sample))
    return np.concatenate(parts)


def _complete(world: World, items: list[Item], vae: AutoencoderTiny, seed: int) -> Pictures:
    pixels = np.stack([render(world, item) for item in items])
    chosen = np.random.default_rng(seed).permutation(len(items))[: round(SOFT * len(items))]
    return Pictures(np.concatenate([pixels, soften(pixels[chosen], vae)]), items + [items[i] for i in chosen])


def natural_and_filtered(recipe: Recipe, vae_folder: Path) -> Pictures:
    """All pictures to learn from, rendered once and kept."""

    def make() -> Pictures:
        world, known = open_world(recipe), [name for name in FILTERS if name not in NEVER_FILTERS]
        vae = AutoencoderTiny.from_pretrained(vae_folder, torch_dtype=torch.float32)
        items = [*natural(world), *plan(world, known, FILTERS_EACH, recipe.seed)]
        return _complete(world, items, vae, recipe.seed)

    mark = hash_files(*sorted(vae_folder.glob("*.safetensors")))
    return kept(recipe.output / "pictures.npy", recipe.world, [recipe.seed, VARIANTS, FILTERS_EACH, SOFT, mark], make)


def disturb(pixels: Tensor, rng: np.random.Generator) -> Tensor:
    """Move, scale, soften and roughen pictures [N, 3, R, R]: measures must not rely on places or on sharpness."""
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
