"""LoRAs that a method trains: fresh branches in a UNet, their export, and the state and switches of all methods."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from PIL import Image
from torch import Tensor, nn

from unziplora.config.training import ImageConfig, TrainingConfig
from unziplora.lora.algebra import Pair, fold_output
from unziplora.lora.inject import add_lora, inject
from unziplora.lora.layer import Branch
from unziplora.lora.weights import Lora
from unziplora.models.text import Prompts
from unziplora.training.loss import Examples, denoising_loss, generator
from unziplora.training.method import Method, View
from unziplora.training.text_encoder_lora import TextLora

C = TypeVar("C", bound=TrainingConfig)

Branches = dict[str, Branch]
"""The branches of one LoRA by module path."""


class AdapterMethod(Method[C]):
    """Base class of the methods: LoRAs by name on a frozen UNet, and on text encoders where a LoRA has such a part.

    Attributes:
        branches: the UNet's part of each LoRA, by LoRA name and module path.
        text: the text encoders' part, by LoRA name.
        images: training images.
    """

    def __init__(
        self,
        unet: nn.Module,
        scheduler: DDPMScheduler,
        config: C,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        images: Sequence[Image.Image] = (),
    ) -> None:
        """Store what every method needs; a subclass adds its LoRAs.

        Args:
            unet: frozen, without LoRAs; the method changes it in place.
            scheduler: noise schedule and prediction type of the base.
            config: the recipe.
            autocast: context of the forward passes.
            images: training images; the first one goes into the sample sheet.
        """
        self.unet, self.scheduler, self.config, self.autocast = unet, scheduler, config, autocast
        self.predict = unet
        self.images = list(images)
        self.branches: dict[str, Branches] = {}
        self.text: dict[str, TextLora] = {}

    def denoising_loss(self, examples: Examples, draw: torch.Generator, **conditioning: Any) -> Tensor:
        """Return the denoising error of the recipe on examples, a scalar (`training.loss.denoising_loss`)."""
        with self.autocast():
            return denoising_loss(
                self.predict, self.scheduler, examples, draw=draw, **conditioning, **self.config.noising()
            )

    def only(self, name: str) -> AbstractContextManager[None]:
        """Switch all other LoRAs off in the UNet; prompts stay as they are encoded."""
        return switched_off(*(branches for other, branches in self.branches.items() if other != name))

    @contextmanager
    def off(self, names: tuple[str, ...]) -> Iterator[None]:
        """Switch off LoRAs by name, with all their parts."""
        with ExitStack() as stack:
            for name in names:
                if name in self.text:
                    stack.enter_context(self.text[name].off())
            stack.enter_context(switched_off(*(self.branches[name] for name in names if name in self.branches)))
            yield

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors of all LoRAs by name, for a checkpoint."""
        state = {
            f"{name}.{path}.{key}": tensor
            for name, branches in self.branches.items()
            for path, branch in branches.items()
            for key, tensor in branch.state_dict().items()
        }
        for text in self.text.values():
            state.update(text.state_dict())
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the tensors of a checkpoint of the same recipe."""
        for name, branches in self.branches.items():
            for path, branch in branches.items():
                branch.load_state_dict({key: state[f"{name}.{path}.{key}"] for key in branch.state_dict()})
        for text in self.text.values():
            text.load_state_dict(state)

    def export(self) -> dict[str, Lora]:
        """Return the LoRAs by name as plain pairs: masks, scales and alpha folded into B."""
        text = {name: part.export() for name, part in self.text.items()}
        return {name: Lora(folded(branches), text=text.get(name, {})) for name, branches in self.branches.items()}


def new_branches(
    unet: nn.Module,
    name: str,
    paths: Iterable[str],
    config: ImageConfig,
    *,
    stream: str = "full",
    official_code: bool = False,
) -> Branches:
    """Add an untrained LoRA to a UNet's linear layers; its column scales are ones, and frozen."""
    modules = {}
    for path, layer in inject(unet, paths).items():
        draw = generator(config.seed, "init", name, path)
        modules[path] = initial_pair(layer.in_features, layer.out_features, config.rank, official_code, draw)
    branches = add_lora(unet, name, modules, (config.alpha or config.rank) / config.rank, stream)
    for branch in branches.values():
        branch.scale.requires_grad_(False)
    return branches


def initial_pair(in_features: int, out_features: int, rank: int, official_code: bool, draw: torch.Generator) -> Pair:
    """Draw the start of a LoRA: A [r, in] uniform in ±1/√in, B [out, r] zero, so that ΔW = 0 (arXiv 2106.09685).

    Args:
        official_code: draw both from a normal distribution with std 1/r, as UnZipLoRA's official code does.
    """
    if official_code:
        shapes = (rank, in_features), (out_features, rank)
        down, up = (torch.randn(shape, generator=draw) / rank for shape in shapes)
        return down, up
    bound = 1 / math.sqrt(in_features)
    down = (torch.rand(rank, in_features, generator=draw) * 2 - 1) * bound
    return down, torch.zeros(out_features, rank)


def matrices(*loras: Branches) -> list[nn.Parameter]:
    """Return the trained matrices A and B."""
    return [p for branches in loras for branch in branches.values() for p in (branch.down, branch.up)]


@torch.no_grad()
def folded(branches: Branches) -> dict[str, Pair]:
    """Return a LoRA as pairs (A [r, in], B [out, r]) of strength 1: masks, scales and alpha folded into B."""
    parts = {path: fold_output((b.down, b.up), b.columns()) for path, b in branches.items()}
    return {path: (down.cpu(), up.cpu()) for path, (down, up) in parts.items()}


@contextmanager
def switched_off(*loras: Branches) -> Iterator[None]:
    """Temporarily set the strength of LoRAs to 0."""
    branches = [branch for lora in loras for branch in lora.values()]
    strengths = [branch.strength for branch in branches]
    for branch in branches:
        branch.strength = 0.0
    try:
        yield
    finally:
        for branch, strength in zip(branches, strengths, strict=True):
            branch.strength = strength


def pair_views(config: ImageConfig, together: Prompts, content: str, style: str) -> list[View]:
    """Return the views of a content and a style LoRA: both; the content in another style; the style on another subject.

    Args:
        together: prompts for both LoRAs.
        content: prompt that the content LoRA was trained with.
        style: placeholder of the style in prompt templates.
    """
    new_style, subject = config.sample_style, config.sample_subject
    return [
        View("together", together),
        View(f"content, {new_style}", Prompts(f"{content} in {new_style} style"), off=("style",)),
        View(f"style, {subject}", Prompts(config.fill(f"a {subject} in {style} style")), off=("content",)),
    ]
