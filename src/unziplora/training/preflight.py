"""Checks of a recipe that run before a folder is created and a base is loaded."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from typing import TypeVar

import torch

from unziplora.config.training import ImageConfig, TrainingConfig
from unziplora.errors import UserError
from unziplora.images.preprocess import check_images
from unziplora.models.base import Base
from unziplora.models.device import pick_device, pick_dtype
from unziplora.models.sizes import base_folder, inspect_base, stored_bytes
from unziplora.training.method import Method
from unziplora.training.optimizers import find_optimizer
from unziplora.utils.progress import size

C = TypeVar("C", bound=TrainingConfig)


def check_run(kind: type[Method[C]], config: C, side: int, base: Base | None = None) -> None:
    """Refuse a recipe that cannot be trained, before a folder is created and a base is loaded.

    Args:
        side: side in pixels at which images and masks are opened.
        base: used instead of the configured one, if it is loaded already.

    Raises:
        UserError: an image, a mask, a word, a block map or the base is not usable, or this machine lacks what a
            setting needs.
    """
    if isinstance(config, ImageConfig):
        check_images(config.images, config.masks, side)
    kind.check(config, base)
    device = pick_device(config.device) if base is None else base.device
    half = (pick_dtype(config.precision, device) if base is None else base.dtype) == torch.float16
    if half and device.type == "cpu":
        raise UserError("precision fp16 needs a GPU: choose bf16 or fp32 on a CPU")
    # A loss scaler serves one optimizer, and Prodigy needs one for each LoRA.
    if half and config.optimizer == "prodigy":
        raise UserError("Prodigy does not go with fp16: set precision to bf16 or fp32, or optimizer to adamw")
    for name in config.trackers:
        if find_spec(name) is None:
            raise UserError(f"tracker {name} is not installed: pip install {name}, or leave it out")
    find_optimizer(config.optimizer)
    if config.resolution:
        scale = inspect_base(config.base).latent_scale if base is None else base.pipe.vae_scale_factor
        check_resolution(config.resolution, scale)
    elif base is None:
        base_folder(config.base)


def warn_of_memory(kind: type[Method[C]], config: C) -> None:
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
    memory = estimate(config, sizes, kind.layers(config, sizes.names))
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
