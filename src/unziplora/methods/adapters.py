"""What every method is made of: branches that start as LoRA does, encoded pictures, views for the sample sheet."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from PIL import Image
from torch import Tensor, nn

from unziplora.config.training import PictureConfig, TrainingConfig
from unziplora.images.preprocess import load_mask, load_picture, to_tensor
from unziplora.lora.algebra import Pair, fold_output
from unziplora.lora.inject import add_lora, inject
from unziplora.lora.layer import Branch
from unziplora.methods.class_images import class_pictures
from unziplora.models.base import Base
from unziplora.models.text import Prompts, embed, time_ids
from unziplora.models.vae import encode_pictures, loss_weights, picture_conditioning, to_device
from unziplora.sampling.pipeline import Settings
from unziplora.training.loss import Examples, generator

Branches = dict[str, Branch]
"""The branches of one LoRA by module path."""


@dataclass(frozen=True)
class Setup:
    """What a method is built with.

    Attributes:
        base: frozen, without LoRAs.
        size: side of the training pictures in pixels.
        autocast: context of the forward passes.
        report: tells the user something worth a line.
        resumed: a checkpoint will be loaded next, with all that was learnt before it.
    """

    base: Base
    size: int
    autocast: Callable[[], AbstractContextManager[object]]
    report: Callable[[str], None]
    resumed: bool = False

    def noise_schedule(self) -> DDPMScheduler:
        """How the base was trained to see noise."""
        return DDPMScheduler.from_config(self.base.scheduler.config)

    def make_room(self, config: TrainingConfig, keep_text: bool = False) -> None:
        """Make room for training the UNet, once all pictures are encoded: the encoders go to the CPU.

        The text encoders stay where they are needed in every step (`keep_text`). Gradient checkpointing begins here,
        if the recipe asks for it.
        """
        for module in (self.base.vae, *(() if keep_text else self.base.text_encoders)):
            module.to("cpu")
        if config.gradient_checkpointing:
            self.base.unet.enable_gradient_checkpointing()


@dataclass(frozen=True)
class View:
    """A column of the sample sheet: prompts, and the LoRAs (by name) that are switched off for it."""

    title: str
    prompts: Prompts
    off: tuple[str, ...] = field(default=())


def load_pictures(config: PictureConfig, size: int) -> list[Image.Image]:
    """The configured pictures, square, of a side in pixels."""
    return [load_picture(path, size) for path in config.images]


def picture_examples(
    setup: Setup, config: PictureConfig, pictures: list[Image.Image], prompts: Prompts | list[str]
) -> Examples:
    """The pictures as latents, the prompts (for all, or one each) as conditioning, masks as weights of the loss."""
    latents = encode_pictures(setup.base, [to_tensor(picture) for picture in pictures])
    masks = [load_mask(m, setup.size, picture=p) for m, p in zip(config.masks, config.images, strict=False)]
    weights = loss_weights(masks, latents, config.background_weight)
    if isinstance(prompts, Prompts):
        seen = picture_conditioning(setup.base, prompts, setup.size, len(pictures))
    else:
        seen = embed(setup.base, prompts).with_time_ids(time_ids(setup.size, setup.size, len(pictures)))
    return to_device(Examples(latents, seen, weights), setup.base)


def class_examples(
    setup: Setup, config: TrainingConfig, prompts: Prompts, count: int, folder: Path | None = None
) -> Examples:
    """Class pictures by the base itself, as latents, for prior preservation (DreamBooth, arXiv 2208.12242)."""
    size = setup.size
    settings = Settings.square(
        size, steps=config.sample_steps, guidance=config.sample_guidance, batch_size=config.batch_size
    )
    pictures = class_pictures(setup.base, prompts.full, count, settings, setup.report, folder)
    latents = encode_pictures(setup.base, [to_tensor(picture) for picture in pictures])
    return to_device(Examples(latents, picture_conditioning(setup.base, prompts, size, count)), setup.base)


def new_branches(
    unet: nn.Module,
    name: str,
    paths: Iterable[str],
    config: PictureConfig,
    *,
    stream: str = "full",
    start: str = "zeros",
) -> Branches:
    """Add an untrained LoRA to a UNet's linear layers; its column scales are ones, and frozen."""
    modules = {}
    for path, layer in inject(unet, paths).items():
        draw = generator(config.seed, "init", name, path)
        modules[path] = initial_pair(layer.in_features, layer.out_features, config.rank, start, draw)
    branches = add_lora(unet, name, modules, (config.alpha or config.rank) / config.rank, stream)
    for branch in branches.values():
        branch.scale.requires_grad_(False)
    return branches


def initial_pair(in_features: int, out_features: int, rank: int, start: str, draw: torch.Generator) -> Pair:
    """A LoRA's start: A [r, in] uniform in ±1/√in with B [out, r] zero, or both normal with std 1/r.

    The first is LoRA's (arXiv 2106.09685: ΔW = 0), the second that of UnZipLoRA's official code.
    """
    if start == "gaussian":
        shapes = (rank, in_features), (out_features, rank)
        down, up = (torch.randn(shape, generator=draw) / rank for shape in shapes)
        return down, up
    bound = 1 / math.sqrt(in_features)
    down = (torch.rand(rank, in_features, generator=draw) * 2 - 1) * bound
    return down, torch.zeros(out_features, rank)


def matrices(branches: Branches) -> list[nn.Parameter]:
    """The trained matrices A and B."""
    return [p for branch in branches.values() for p in (branch.down, branch.up)]


def branch_state(branches: Branches, prefix: str) -> dict[str, Tensor]:
    """A LoRA's tensors by name, for a checkpoint."""
    return {f"{prefix}.{path}.{key}": t for path, b in branches.items() for key, t in b.state_dict().items()}


def load_branch_state(branches: Branches, prefix: str, state: Mapping[str, Tensor]) -> None:
    """The inverse of `branch_state`."""
    for path, branch in branches.items():
        branch.load_state_dict({key: state[f"{prefix}.{path}.{key}"] for key in branch.state_dict()})


@torch.no_grad()
def folded(branches: Branches) -> dict[str, Pair]:
    """A LoRA as plain pairs (A [r, in], B [out, r]) of strength 1: masks, scales, alpha folded into B."""
    parts = {path: fold_output((b.down, b.up), b.columns()) for path, b in branches.items()}
    return {path: (down.cpu(), up.cpu()) for path, (down, up) in parts.items()}


@contextmanager
def switched_off(*loras: Branches) -> Iterator[None]:
    """Have LoRAs at strength 0 for a while."""
    branches = [branch for lora in loras for branch in lora.values()]
    strengths = [branch.strength for branch in branches]
    for branch in branches:
        branch.strength = 0.0
    try:
        yield
    finally:
        for branch, strength in zip(branches, strengths, strict=True):
            branch.strength = strength
