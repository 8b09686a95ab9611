"""The sample sheet of a split: what the two LoRAs do together, alone and apart, with fixed seeds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from PIL import Image

from unziplora.base import Base
from unziplora.config import SplitConfig
from unziplora.generate import generate
from unziplora.grid import sheet
from unziplora.methods.unziplora import UnZipLora
from unziplora.prompts import Prompts


def sample_sheet(base: Base, method: UnZipLora, config: SplitConfig, picture: Image.Image) -> Image.Image:
    """A labelled sheet with a row per seed: the input, both LoRAs together, each alone away from the other's word.

    Content is sampled in another style and style on another subject, from one plain prompt each, as a user
    of the exported files would; both together with the three prompts of the training.
    """
    words = config.prompts()
    together = Prompts(**words) if config.prompt_separation else Prompts(words["full"])
    columns = {
        "input": None,
        "together": (together, nullcontext()),
        f"content, {config.sample_style}": (
            Prompts(f"{words['content']} in {config.sample_style} style"),
            method.only("content"),
        ),
        f"style, {config.sample_subject}": (
            Prompts(config.fill(f"a {config.sample_subject} in {{style}} style")),
            method.only("style"),
        ),
    }
    made = []
    with _frozen(base):
        for column in columns.values():
            if column is None:
                made.append([picture] * len(config.sample_seeds))
                continue
            prompts, context = column
            with context:
                pictures = generate(
                    base,
                    prompts,
                    seeds=config.sample_seeds,
                    steps=config.sample_steps,
                    guidance=config.sample_guidance,
                    width=picture.width,
                    height=picture.height,
                )
            made.append(pictures)
    rows = [list(row) for row in zip(*made, strict=True)]
    return sheet(rows, [f"seed {seed}" for seed in config.sample_seeds], list(columns))


@contextmanager
def _frozen(base: Base) -> Iterator[None]:
    """Without gradient checkpointing while sampling: it is for training alone, and warns otherwise."""
    checkpointing = base.unet.is_gradient_checkpointing
    if checkpointing:
        base.unet.disable_gradient_checkpointing()
    try:
        yield
    finally:
        if checkpointing:
            base.unet.enable_gradient_checkpointing()
