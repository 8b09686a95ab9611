"""Checks of a recipe that run before a folder is created and a base is loaded."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from typing import TypeVar

import torch
from PIL import Image

from unziplora.config.templates import warn_of_ui_syntax
from unziplora.config.training import ImageConfig, TrainingConfig
from unziplora.errors import UserError
from unziplora.images.preprocess import Size, load_images, warn_of_flaws
from unziplora.images.sheet import sheet
from unziplora.models.base import Base, Scale
from unziplora.models.device import pick_device, pick_dtype
from unziplora.models.sizes import inspect_base, scale_of, stored_bytes
from unziplora.training.method import Method, OpenedImages
from unziplora.training.optimizers import find_optimizer
from unziplora.utils.progress import size

C = TypeVar("C", bound=TrainingConfig)


def check_run(kind: type[Method[C]], config: C, base: Base | None = None) -> OpenedImages:
    """Check a recipe as `checked_images` does, and warn of flaws that do not keep it from being trained."""
    images = checked_images(kind, config, base)
    warn_of_ui_syntax(config.filled_prompts().values())
    warn_of_flaws(images.flaws)
    return images


def checked_images(kind: type[Method[C]], config: C, base: Base | None = None) -> OpenedImages:
    """Refuse a recipe that cannot be trained, before a folder is created and a base is loaded; return its images.

    Args:
        base: used instead of the configured one, if it is loaded already.

    Raises:
        UserError: an image, a mask, a word, a block map or the base is not usable, or this machine lacks what a
            setting needs.
    """
    kind.check(config, base)
    kind.describe(config)
    device = pick_device(config.device) if base is None else base.device
    half = (pick_dtype(config.precision, device) if base is None else base.dtype) == torch.float16
    if half and device.type == "cpu":
        raise UserError("precision fp16 needs a GPU: choose bf16 or fp32 on a CPU")
    for name in config.trackers:
        if find_spec(name) is None:
            raise UserError(f"tracker {name} is not installed: pip install {name}, or leave it out")
    find_optimizer(config.optimizer)
    scale = scale_of(config.base) if base is None else base.scale
    return open_images(kind, config, scale)


def open_images(kind: type[Method[C]], config: C, scale: Scale) -> OpenedImages:
    """Open the images and masks of a run, each once, at the size at which they are learned.

    Raises:
        UserError: one of them is not usable, or the resolution does not fit the base.
    """
    side = config.resolution or scale.resolution
    check_resolution(side, scale.latent)
    groups = {}
    for name, (files, fit) in kind.image_groups(config).items():
        sizes = scale.sizes(side) if fit == "bucket" else [(side, side)]
        groups[name] = load_images(files, sizes, whole=fit == "pad", uncropped=fit == "crop")
    first = next((images[0].image.size for images in groups.values() if images), (side, side))
    return OpenedImages(scale, first, groups)


def warn_of_memory(kind: type[Method[C]], config: C, image_size: Size) -> None:
    """Warn if the memory of a CPU is too small.

    A GPU that runs out of memory raises an error, but an operating system silently kills the process.
    """
    device = pick_device(config.device)
    if device.type != "cpu" or not isinstance(config, ImageConfig):
        return
    from unziplora.training.memory import estimate, free_bytes

    free, stored = free_bytes(device) or 0, stored_bytes(config.base)
    if stored is not None and 2 * stored * (8 + 4 * config.batch_size) < free:
        return  # more than any training needs, and an estimate takes seconds
    sizes = inspect_base(config.base)
    memory = estimate(config, sizes, kind.layers(config, sizes.names), image_size)
    if memory.fits is False:
        warnings.warn(
            f"about {size(memory.total)} of memory are needed and {size(free)} are free, so the system may end this "
            f"run{memory.needs_less}. --dry-run lists what needs how much",
            stacklevel=2,
        )


def check_resolution(resolution: int, latent_scale: int) -> None:
    """Refuse a resolution whose latents cannot be halved twice, as the UNet does.

    Raises:
        UserError: it cannot; the message names the nearest one that can.
    """
    unit = latent_scale * 4
    if resolution % unit:
        near = max(unit, round(resolution / unit) * unit)
        raise UserError(f"resolution {resolution}: must be a multiple of {unit} for this base, such as {near}")


def preview(images: OpenedImages) -> Image.Image:
    """Return what a run learns, at the training size; several images in rows of four."""
    shown = [image.learned() for group in images.groups.values() for image in group]
    return shown[0] if len(shown) == 1 else sheet([shown[start : start + 4] for start in range(0, len(shown), 4)])
