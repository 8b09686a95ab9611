"""All pictures of a recipe, rendered once and kept in one file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from recipes.base.config import Recipe, WorldSettings
from recipes.base.filters.common import Picture
from recipes.base.processes import on_processes
from recipes.base.world import NEVER_SETS, Item, World, held_out_concepts


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
    return Pictures(np.concatenate(on_processes(_render, jobs, workers)), items)


def kept(path: Path, settings: WorldSettings, told: object, make: Callable[[], Pictures]) -> Pictures:
    """Pictures from a .npy, with their items as JSON beside it; made anew if they were made with other settings.

    Args:
        settings: of the world; the list of concepts that are held out counts too.
        told: whatever else the pictures depend on.
        make: makes them.
    """
    source = json.dumps([settings.model_dump(mode="json"), sorted(held_out_concepts()), told], sort_keys=True)
    beside = path.with_suffix(".json")
    known = json.loads(beside.read_text()) if path.exists() and beside.exists() else None
    if isinstance(known, dict) and known["source"] == source:
        return Pictures(np.load(path), [Item(**entry) for entry in known["items"]])
    pictures = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    beside.unlink(missing_ok=True)
    temporary = path.with_suffix(".tmp.npy")
    np.save(temporary, pictures.pixels)
    os.replace(temporary, path)
    beside.write_text(json.dumps({"source": source, "items": [asdict(item) for item in pictures.items]}))
    return pictures


def training_pictures(recipe: Recipe) -> Pictures:
    """The pictures of a recipe, from its output folder when they are already there."""

    def make() -> Pictures:
        return render_items(recipe.world, list(World(recipe.world).items()), workers=recipe.threads)

    return kept(recipe.output / "pictures.npy", recipe.world, None, make)


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
