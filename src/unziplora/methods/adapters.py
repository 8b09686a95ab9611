"""LoRAs that a method trains: fresh branches in a UNet, their export, and the state and switches of all methods."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Protocol, TypeVar

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from PIL import Image
from torch import Tensor, nn

from unziplora.config.templates import in_style
from unziplora.config.training import ImageConfig, TrainingConfig
from unziplora.lora.algebra import Pair, fold_output
from unziplora.lora.blocks import BLOCK_MAPS, check_blocks, read_blocks
from unziplora.lora.inject import add_lora, filter_targets, inject, target_layers
from unziplora.lora.layer import Branch
from unziplora.lora.weights import Lora
from unziplora.models.base import Base
from unziplora.models.sizes import inspect_base
from unziplora.models.text import Conditioning, Prompts
from unziplora.training.loss import Examples, denoising_loss, generator
from unziplora.training.method import Method, View
from unziplora.training.text_encoder_lora import TextLora


def check_block_map(source: str, targets: Sequence[str], base_name: str, base: Base | None) -> None:
    """Refuse a block map of one's own for a base that has none of the layers of one of its blocks.

    The maps of the package are not looked up in a base, which takes seconds, nor is a map in a base that must be
    downloaded first.

    Raises:
        UserError: as `read_blocks` and `check_blocks`; or there is no such base.
    """
    blocks = read_blocks(source)
    if source in BLOCK_MAPS:
        return
    if base is not None:
        check_blocks(blocks, target_layers(base.unet, targets))
    elif not (sizes := inspect_base(base_name)).assumed:
        check_blocks(blocks, filter_targets(sizes.names, targets))


class Data(Protocol):
    """Data that a method learns from; the sample sheet of every method shows the images."""

    @property
    def images(self) -> Sequence[Image.Image]: ...


C = TypeVar("C", bound=TrainingConfig)
D = TypeVar("D", bound=Data)

Branches = dict[str, Branch]
"""The branches of one LoRA by module path."""


@dataclass(frozen=True)
class TrainingData:
    """Everything that the LoRAs of one run learn from.

    Attributes:
        examples: the images with the conditioning of their prompts; with prompt separation, that of three prompts
            joined (`join_streams`).
        alone: examples of the steps in which a LoRA learns alone, by LoRA name; default: `examples`.
        priors: class images, by the name of the LoRA whose prior they preserve.
        text: LoRA of the text encoders, if there is one.
        images: the training images, for the sample sheet.
    """

    examples: Examples
    alone: Mapping[str, Examples] = field(default_factory=dict)
    priors: Mapping[str, Examples] = field(default_factory=dict)
    text: TextLora | None = None
    images: Sequence[Image.Image] = ()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the embeddings computed with the text encoders' LoRA by name; none without such a LoRA.

        Learning them again takes minutes, and on another device gives other last digits.
        """
        if self.text is None:
            return {}
        return {
            f"conditioning.{name}.{part}": getattr(examples.conditioning, part)
            for part in ("tokens", "pooled")
            for name, examples in {"full": self.examples, **self.alone}.items()
        }

    def restored(self, state: Mapping[str, Tensor]) -> TrainingData:
        """Return a copy with the embeddings of a checkpoint."""
        if self.text is None:
            return self

        def restore(name: str, examples: Examples) -> Examples:
            now = examples.conditioning
            tokens, pooled = (state[f"conditioning.{name}.{part}"] for part in ("tokens", "pooled"))
            conditioning = Conditioning(tokens.to(now.tokens), pooled.to(now.pooled), now.time_ids)
            return replace(examples, conditioning=conditioning)

        alone = {name: restore(name, examples) for name, examples in self.alone.items()}
        return replace(self, examples=restore("full", self.examples), alone=alone)


class AdapterMethod(Method[C], Generic[C, D]):
    """Base class of the methods: LoRAs by name on a frozen UNet, and on text encoders where a LoRA has such a part.

    Attributes:
        branches: the UNet's part of each LoRA, by LoRA name and module path.
        text: the text encoders' part, by LoRA name.
    """

    def __init__(
        self,
        unet: nn.Module,
        scheduler: DDPMScheduler,
        data: D,
        config: C,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """Add the method's LoRAs to a frozen UNet, in place.

        Args:
            scheduler: noise schedule and prediction type of the base.
            autocast: context of the forward passes.

        Raises:
            UserError: the recipe names blocks that this UNet does not have.
        """
        self.unet, self.scheduler, self.data, self.config, self.autocast = unet, scheduler, data, config, autocast
        self.predict = unet
        self.images = list(data.images)
        self.branches: dict[str, Branches] = {}
        self.text: dict[str, TextLora] = {}
        self.add_loras()

    def add_loras(self) -> None:
        """Add the LoRAs to the UNet."""
        raise NotImplementedError

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
        for name, branches in self.branches.items():
            for path, branch in branches.items():
                branch.load_state_dict({key: state[f"{name}.{path}.{key}"] for key in branch.state_dict()})
        for text in self.text.values():
            text.load_state_dict(state)

    def export(self) -> dict[str, Lora]:
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
    """Add an untrained LoRA to layers of a UNet; its column scales are ones, and frozen."""
    modules = {}
    for path, layer in inject(unet, paths).items():
        draw = generator(config.seed, "init", name, path)
        modules[path] = initial_pair(layer.base.weight.shape, config.rank, official_code, draw)
    branches = add_lora(unet, name, modules, (config.alpha or config.rank) / config.rank, stream)
    for branch in branches.values():
        branch.scale.requires_grad_(False)
    return branches


def initial_pair(weight: Sequence[int], rank: int, official_code: bool, draw: torch.Generator) -> Pair:
    """Draw the start of a LoRA: A [r, in] uniform in ±1/√in, B [out, r] zero, so that ΔW = 0 (arXiv 2106.09685).

    Args:
        weight: shape of the layer's weight; of a convolution, in · kh · kw counts as `in`.
        official_code: draw both from a normal distribution with std 1/r, as UnZipLoRA's official code does.
    """
    out, *inputs = weight
    down_shape, up_shape = (rank, *inputs), (out, rank, *[1] * (len(inputs) - 1))
    if official_code:
        down, up = (torch.randn(shape, generator=draw) / rank for shape in (down_shape, up_shape))
        return down, up
    bound = 1 / math.sqrt(math.prod(inputs))
    return (torch.rand(down_shape, generator=draw) * 2 - 1) * bound, torch.zeros(up_shape)


def matrices(*loras: Branches) -> list[nn.Parameter]:
    """Return the trained matrices A and B."""
    return [p for branches in loras for branch in branches.values() for p in (branch.down, branch.up)]


@torch.no_grad()
def folded(branches: Branches) -> dict[str, Pair]:
    """Return a LoRA as pairs of A and B (see `Branch`) of strength 1: masks, scales and alpha folded into B."""
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
        View(f"content, {new_style}", Prompts(in_style(content, new_style)), off=("style",)),
        View(f"style, {subject}", Prompts(config.fill(f"a {subject} in {style} style")), off=("content",)),
    ]
