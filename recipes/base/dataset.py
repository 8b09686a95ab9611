"""All pictures of a recipe, rendered once and kept in one file."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from recipes.base.config import Recipe, WorldSettings
from recipes.base.filters.common import Picture
from recipes.base.world import NEVER_SETS, Item, World


@dataclass
class Pictures:
    """Pictures uint8 [N, R, R, 3] and what each shows."""

    pixels: Picture
    items: list[Item]

    def __len__(self) -> int:
        return len(self.items)


def _render(job: tuple[WorldSettings, list[Item], int]) -> Picture:
    settings, items, resolution = job
    world = World(settings)
    return np.stack([world.render(item, resolution) for item in items])


def render_items(settings: WorldSettings, items: list[Item], *, workers: int = 1) -> Pictures:
    """Render items, on several processes if asked."""
    chunks = [items[i : i + 256] for i in range(0, len(items), 256)]
    jobs = [(settings, chunk, settings.resolution) for chunk in chunks]
    if workers == 1:
        parts = [_render(job) for job in jobs]
    else:
        with ProcessPoolExecutor(workers) as pool:
            parts = list(pool.map(_render, jobs))
    return Pictures(np.concatenate(parts), items)


def save(pictures: Pictures, path: Path) -> None:
    """Write pixels as .npy and items as JSON beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps([asdict(item) for item in pictures.items]))
    temporary = path.with_suffix(".tmp.npy")
    np.save(temporary, pictures.pixels)
    os.replace(temporary, path)


def load(path: Path) -> Pictures:
    """Read what `save` wrote."""
    items = [Item(**entry) for entry in json.loads(path.with_suffix(".json").read_text())]
    return Pictures(np.load(path), items)


def training_pictures(recipe: Recipe) -> Pictures:
    """The pictures of a recipe, from its output folder when they are already there."""
    path = recipe.output / "pictures.npy"
    if not path.exists():
        items = list(World(recipe.world).items())
        save(render_items(recipe.world, items, workers=recipe.threads), path)
    return load(path)


def unseen_drawings(world: World, count: int = 64, seed: int = 1, filters: Sequence[str] = ()) -> Pictures:
    """Never-trained drawings, also of held-out concepts, unfiltered or in filters by turns, for measuring only."""
    rng = np.random.default_rng(seed)
    every = [
        Item(concept, drawing, "flat")
        for drawing in sorted(NEVER_SETS - {"unifont"})
        for concept in world.concepts
        if world.has(drawing, concept)
    ]
    items = [every[i] for i in rng.choice(len(every), min(count, len(every)), replace=False)]
    if filters:
        turns = [filters[number % len(filters)] for number in range(len(items))]
        items = [replace(item, style=turn, filter=turn) for item, turn in zip(items, turns, strict=True)]
    return render_items(world.settings, items)
