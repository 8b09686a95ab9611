"""Class pictures for prior preservation (DreamBooth, arXiv 2208.12242): made by the base once, kept, used again."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from PIL import Image

from unziplora.images.preprocess import load_image
from unziplora.models.base import Base
from unziplora.sampling.pipeline import Settings, decode, generate_latents
from unziplora.utils.files import explain, write_png

FIRST_SEED = 1_000_000
"""Class pictures have seeds of their own, far from those of samples."""

ENDINGS = {".png", ".jpg", ".jpeg", ".webp"}


def class_images(
    base: Base,
    prompt: str,
    count: int,
    settings: Settings,
    report: Callable[[str], None],
    folder: Path | None = None,
) -> list[Image.Image]:
    """Pictures of a class, square, of the settings' width, by file name: those in the folder, and new ones, now kept.

    Args:
        base: makes what is missing; without LoRAs.
        prompt: what the class is called.
        count: how many are wanted.
        settings: how to make them.
        report: called when pictures are made.
        folder: any pictures in it count; default: a folder in the user's cache for this base, prompt and settings.

    Raises:
        UserError: a picture in the folder cannot be read.
        MachineError: disk full, no permission.
    """
    folder = (folder or cache_folder(base, prompt, settings)).expanduser()
    side = settings.width or base.resolution
    try:
        folder.mkdir(parents=True, exist_ok=True)
        found = sorted(path for path in folder.iterdir() if path.suffix.lower() in ENDINGS)[:count]
    except OSError as error:
        raise explain(folder, error) from None
    pictures = {path: load_image(path, side) for path in found}
    free = (seed for seed in itertools.count(FIRST_SEED + len(found)) if not (folder / f"{seed}.png").exists())
    seeds = list(itertools.islice(free, count - len(found)))
    if seeds:
        report(f"generating {len(seeds)} class pictures into {folder}: {prompt}")
    for start in range(0, len(seeds), settings.batch_size):
        batch = seeds[start : start + settings.batch_size]
        made = decode(base, generate_latents(base, prompt, batch, settings))
        for seed, picture in zip(batch, made, strict=True):
            write_png(folder / f"{seed}.png", picture)
            pictures[folder / f"{seed}.png"] = picture
    return [pictures[path] for path in sorted(pictures)]  # as the next call finds them


def cache_folder(base: Base, prompt: str, settings: Settings) -> Path:
    """Where class pictures of this base, prompt and these settings are kept: UNZIPLORA_CACHE, or ~/.cache/unziplora."""
    root = os.environ.get("UNZIPLORA_CACHE")
    home = Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "unziplora"
    told = repr((base.fingerprint(), prompt, replace(settings, batch_size=1))).encode()
    words = re.sub(r"\W+", "-", prompt.lower()).strip("-")[:40]
    return home / "class-pictures" / f"{words}-{hashlib.sha256(told).hexdigest()[:12]}"
