"""The sample sheet of a training: images of the LoRAs together and alone, with fixed seeds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from PIL import Image, ImageOps

from unziplora.config.training import TrainingConfig
from unziplora.images.sheet import GAP, LARGEST, sheet
from unziplora.models.base import Base
from unziplora.sampling.pipeline import Settings, generate
from unziplora.training.method import Method

SMALLEST = 128
"""Side in pixels to which the images of a small base are enlarged."""

LONGEST = LARGEST - 2_000
"""Longest row or column in pixels without labels; larger images are scaled down."""


def sample_sheet(base: Base, method: Method[Any], config: TrainingConfig) -> Image.Image:
    """Return a labeled sheet with a row per seed: the training image, then the method's views."""
    width, height = (config.resolution or base.resolution,) * 2
    columns: dict[str, list[Image.Image]] = {}
    if method.images:
        width, height = method.images[0].size
        columns["input"] = [method.images[0]] * len(config.sample_seeds)
    with _without_checkpointing(base):
        settings = Settings(
            steps=config.sample_steps,
            guidance=config.sample_guidance,
            width=width,
            height=height,
            batch_size=config.samples_at_once(),
        )
        for view in method.views():
            with method.off(view.off):
                columns[view.title] = generate(base, view.prompts, config.sample_seeds, settings)
    room = LONGEST // max(len(columns), len(config.sample_seeds)) - GAP
    rows = [[_scaled(image, room) for image in row] for row in zip(*columns.values(), strict=True)]
    return sheet(rows, [f"seed {seed}" for seed in config.sample_seeds], list(columns))


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
