"""What cannot be trained is told before a folder is made and a base is loaded."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TypeVar

import torch

from unziplora.base_sizes import base_folder, inspect_base
from unziplora.config_training import PictureConfig, TrainingConfig
from unziplora.device import pick_device, pick_dtype
from unziplora.errors import UserError
from unziplora.images import load_mask, load_picture
from unziplora.methods.base import Method
from unziplora.optim import find_optimizer

C = TypeVar("C", bound=TrainingConfig)


def check_job(kind: type[Method[C]], config: C, side: int) -> None:
    """Refuse what cannot be trained, before a folder is made and a base is loaded.

    Args:
        side: pixels at which pictures and masks are opened.

    Raises:
        UserError: a picture, a mask, a word, a block map or the base is not usable, or this machine lacks what a
            setting needs.
    """
    if isinstance(config, PictureConfig):
        for path in config.images:
            load_picture(path, side)
        for mask, path in zip(config.masks, config.images, strict=False):
            load_mask(mask, side, path)
    kind.check(config)
    device = pick_device(config.device)
    half = pick_dtype(config.precision, device) == torch.float16
    if half and device.type == "cpu":
        raise UserError("precision fp16 needs a GPU: choose bf16 or fp32 on a CPU")
    # A loss scaler serves one optimiser, and Prodigy needs one for each LoRA.
    if half and config.optimizer == "prodigy":
        raise UserError("Prodigy does not go with fp16: set precision to bf16 or fp32, or optimizer to adamw")
    for name in config.trackers:
        if find_spec(name) is None:  # accelerate would leave it out without a word
            raise UserError(f"tracker {name} is not installed: pip install {name}, or leave it out")
    find_optimizer(config.optimizer)
    if config.resolution:
        check_resolution(config.resolution, inspect_base(config.base).latent_scale)
    else:
        base_folder(config.base)


def check_resolution(resolution: int, latent_scale: int) -> None:
    """Refuse pictures whose latents cannot be halved twice, as they are inside the UNet.

    Raises:
        UserError: names the nearest that can.
    """
    unit = latent_scale * 4
    if resolution % unit:
        near = max(unit, round(resolution / unit) * unit)
        raise UserError(f"resolution {resolution}: must be a multiple of {unit} for this base, such as {near}")
