"""Images of a recipe, rendered once and stored in one file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from recipes.base.config import Recipe, WorldSettings
from recipes.base.filters.common import Pixels
from recipes.base.processes import on_processes
from recipes.base.world import NEVER_SETS, Item, World, held_out_concepts


@dataclass
class Images:
    """Images uint8 [N, R, R, 3] and the item that each shows."""

    pixels: Pixels
    items: list[Item]

    def __len__(self) -> int:
        return len(self.items)


def _render(job: tuple[WorldSettings, list[Item], int]) -> Pixels:
    settings, items, resolution = job
    world = World(settings)
    return np.stack([world.render(item, resolution) for item in items])


def render_items(settings: WorldSettings, items: list[Item], *, workers: int = 1) -> Images:
    """Render items on `workers` processes."""
    chunks = [items[i : i + 256] for i in range(0, len(items), 256)]
    jobs = [(settings, chunk, settings.resolution) for chunk in chunks]
    return Images(np.concatenate(on_processes(_render, jobs, workers)), items)


def stored_images(path: Path, settings: WorldSettings, other: object, make: Callable[[], Images]) -> Images:
    """Read images from a .npy and their items from the JSON next to it; render them again if the settings differ.

    Args:
        path: the .npy file.
        settings: settings of the world; the list of held-out concepts counts too.
        other: everything else that the images depend on, as JSON types.
        make: renders the images.
    """
    source = json.dumps([settings.model_dump(mode="json"), sorted(held_out_concepts()), other], sort_keys=True)
    metadata = path.with_suffix(".json")
    stored = json.loads(metadata.read_text()) if path.exists() and metadata.exists() else None
    if isinstance(stored, dict) and stored["source"] == source:
        return Images(np.load(path), [Item(**entry) for entry in stored["items"]])
    images = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata.unlink(missing_ok=True)
    temporary = path.with_suffix(".tmp.npy")
    np.save(temporary, images.pixels)
    os.replace(temporary, path)
    metadata.write_text(json.dumps({"source": source, "items": [asdict(item) for item in images.items]}))
    return images


def training_images(recipe: Recipe) -> Images:
    """Return the images of a recipe, from its output folder if they are there."""

    def make() -> Images:
        return render_items(recipe.world, list(World(recipe.world).items()), workers=recipe.threads)

    return stored_images(recipe.output / "pictures.npy", recipe.world, None, make)


def unseen_drawings(world: World, count: int = 64, seed: int = 1, filters: Sequence[str] = ()) -> Images:
    """Render never-trained drawings, also of held-out concepts, flat or under `filters` in turn; for measuring only."""
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
