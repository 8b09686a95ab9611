"""Samples of a training: images of the LoRAs together, alone and switched off, with fixed seeds, on a labeled sheet."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageOps

from unziplora.config.recipe import KINDS
from unziplora.config.training import TrainingConfig
from unziplora.images.sheet import GAP, LARGEST, sheet
from unziplora.models.base import Base
from unziplora.sampling.pipeline import Settings, generate
from unziplora.training.method import Method, View

SMALLEST = 256
"""Side in pixels to which the images of a small base are enlarged, so that labels are readable."""

LONGEST = LARGEST - 2_000
"""Longest row or column in pixels without labels; larger images are scaled down."""

EVERY_LORA = (*KINDS, "lora", "scales")


@dataclass(frozen=True)
class Samples:
    """Images of a method's views, one for each seed."""

    images: dict[View, list[Image.Image]]

    def sheet(self, method: Method[Any], config: TrainingConfig) -> Image.Image:
        """Return a labeled sheet with a row per seed: the training image, the base without LoRA, then the views."""
        columns = {f"{view.title}: {view.prompts.full}": row for view, row in self.images.items()}
        if method.images:
            columns = {"input": [method.images[0]] * len(config.sample_seeds), **columns}
        room = LONGEST // max(len(columns), len(config.sample_seeds)) - GAP
        rows = [[_scaled(image, room) for image in row] for row in zip(*columns.values(), strict=True)]
        return sheet(rows, [f"seed {seed}" for seed in config.sample_seeds], list(columns))

    def thumbnails(self) -> dict[str, Image.Image]:
        """Return images for galleries by LoRA name: content and style alone, and everything together as ""."""
        together = next(row[0] for view, row in self.images.items() if not view.off)
        pairs = zip(KINDS, reversed(KINDS), strict=True)
        alone = {
            kind: row[0]
            for kind, other in pairs
            for view, row in self.images.items()
            if other in view.off and kind not in view.off
        }
        return {"": together, **alone}


def generate_samples(
    base: Base, method: Method[Any], config: TrainingConfig, earlier: Samples | None = None
) -> Samples:
    """Generate the images of a method's views, and those of the base without LoRA.

    Args:
        earlier: samples of the same run, in which the base's images are the same.
    """
    views = method.views()
    plain = View("without LoRA", views[0].prompts, off=EVERY_LORA)
    known = {plain: earlier.images[plain]} if earlier else {}
    return Samples({view: known.get(view) or generate_view(base, method, config, view) for view in (plain, *views)})


def generate_view(base: Base, method: Method[Any], config: TrainingConfig, view: View) -> list[Image.Image]:
    """Generate the images of a view, one for each seed of the samples."""
    width, height = (config.resolution or base.resolution,) * 2
    if method.images:
        width, height = method.images[0].size
    settings = Settings(
        steps=config.sample_steps,
        guidance=config.sample_guidance,
        width=width,
        height=height,
        batch_size=config.samples_at_once(),
    )
    with _without_checkpointing(base), method.off(view.off):
        return generate(base, view.prompts, config.sample_seeds, settings)


def _scaled(image: Image.Image, room: int) -> Image.Image:
    """Enlarge a small image, or shrink one that exceeds `room` pixels."""
    times = -(-SMALLEST // min(image.size))
    if times * max(image.size) > room:
        return ImageOps.contain(image, (room, room), Image.Resampling.LANCZOS)
    return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)


@contextmanager
def _without_checkpointing(base: Base) -> Iterator[None]:
    """Switch gradient checkpointing off while sampling: without gradients it saves nothing, and torch warns."""
    checkpointing = base.unet.is_gradient_checkpointing
    if checkpointing:
        base.unet.disable_gradient_checkpointing()
    try:
        yield
    finally:
        if checkpointing:
            base.unet.enable_gradient_checkpointing()
