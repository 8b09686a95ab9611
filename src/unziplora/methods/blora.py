"""B-LoRA (arXiv 2403.14572): one training with one prompt, in two blocks of the UNet, which then are two LoRAs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from PIL import Image
from torch import Tensor, nn

from unziplora.config.blora import BLoraConfig
from unziplora.config.recipe import KINDS
from unziplora.errors import UserError
from unziplora.lora.blocks import BlockMap, check_blocks, read_blocks
from unziplora.lora.inject import attention_linears, filter_targets
from unziplora.lora.weights import Lora
from unziplora.methods.adapters import branch_state, folded, load_branch_state, matrices, new_branches, switched_off
from unziplora.methods.data import image_examples, load_images
from unziplora.models.base import Base
from unziplora.models.text import Prompts
from unziplora.runs.folder import RunFolder
from unziplora.runs.model_card import About, File, image_count
from unziplora.training.loss import Examples, denoising_loss, generator
from unziplora.training.method import Method, Setup, View
from unziplora.training.runner import run_training
from unziplora.utils.progress import Callback


class BLora(Method[BLoraConfig]):
    """Two LoRAs in blocks of their own, and what a job asks of a method.

    Attributes:
        branches: the branches by LoRA name and module path.
    """

    command: ClassVar[str] = "train blora"

    def __init__(
        self,
        unet: nn.Module,
        scheduler: DDPMScheduler,
        examples: Examples,
        config: BLoraConfig,
        blocks: BlockMap,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        pictures: Sequence[Image.Image] = (),
    ) -> None:
        """Inject both LoRAs into the UNet, in place.

        Args:
            unet: frozen, without LoRAs.
            scheduler: says how noise is added and what is predicted.
            examples: the pictures with the conditioning of the prompt.
            config: the recipe.
            blocks: which blocks make which LoRA.
            autocast: context of the forward passes.
            pictures: what the examples were made from, for the sample sheet.

        Raises:
            UserError: the block map names a block that this UNet does not have.
        """
        self.unet, self.scheduler, self.examples, self.config = unet, scheduler, examples, config
        self.predict = unet
        self.autocast, self.pictures = autocast, list(pictures)
        paths = attention_linears(unet)
        check_blocks(blocks, paths)
        owned = {name: [path for path in paths if blocks.owner(path) == name] for name in KINDS}
        self.branches = {name: new_branches(unet, name, owned[name], config) for name in KINDS}

    @classmethod
    def check(cls, config: BLoraConfig, base: Base | None = None) -> None:
        """Read the block map and fill in the prompts.

        Raises:
            UserError: either is not usable.
        """
        blocks = read_blocks(config.blocks)
        if not (blocks.content and blocks.style):
            raise UserError(f"{config.blocks}: B-LoRA needs a block for the content and one for the style")
        Prompts(*map(config.fill, (config.full_prompt, config.content_prompt, config.style_prompt)))

    @classmethod
    def layers(cls, config: BLoraConfig, paths: list[str]) -> dict[str, list[str]]:
        """The attentions of each LoRA's blocks."""
        blocks, attention = read_blocks(config.blocks), filter_targets(paths, ["attention"])
        return {name: [path for path in attention if blocks.owner(path) == name] for name in KINDS}

    @classmethod
    def build(cls, config: BLoraConfig, setup: Setup) -> BLora:
        """Encode pictures and prompt once, then inject both LoRAs."""
        pictures, prompts = load_images(config, setup.size), Prompts(config.fill(config.full_prompt))
        examples = image_examples(setup, config, pictures, prompts)
        setup.make_room(config)
        blocks = read_blocks(config.blocks)
        return cls(setup.base.unet, setup.noise_schedule(), examples, config, blocks, setup.autocast, pictures)

    @classmethod
    def about(cls, config: BLoraConfig) -> About:
        """Two LoRAs from one training."""
        style = config.style_trigger(config.style_prompt, "{token}")
        return About(
            method="B-LoRA (arXiv 2403.14572)",
            made=f"Two LoRAs trained on {image_count(config)}",
            prompt=config.fill(config.full_prompt),
            files={
                "content": File("the content", config.fill(config.content_prompt), "Its blocks hold no style."),
                "style": File("the style", style, "Its blocks hold no content."),
            },
        )

    def parameter_groups(self) -> list[dict[str, Any]]:
        """One optimizer group: the matrices of both LoRAs."""
        config = self.config
        params = [p for name in KINDS for p in matrices(self.branches[name])]
        rate, decay = config.learning_rate, config.weight_decay
        return [{"name": "unet", "params": params, "lr": rate, "weight_decay": decay}]

    def losses(self, step: int) -> Iterator[Tensor]:
        """The denoising error with both LoRAs, a scalar."""
        with self.autocast():
            draw = generator(self.config.seed, "train", step)
            yield denoising_loss(self.predict, self.scheduler, self.examples, draw=draw, **self.config.noising())

    def state_dict(self) -> dict[str, Tensor]:
        """Everything of the method that a checkpoint needs, by name."""
        return {key: t for name in KINDS for key, t in branch_state(self.branches[name], name).items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over the state of a checkpoint of the same recipe."""
        for name in KINDS:
            load_branch_state(self.branches[name], name, state)

    def export(self) -> dict[str, Lora]:
        """Both LoRAs as plain pairs, alpha folded into B."""
        return {name: Lora(folded(self.branches[name])) for name in KINDS}

    def views(self) -> list[View]:
        """Both together; each alone, the content in another style and the style on another subject."""
        config = self.config
        content, style, subject = config.fill(config.content_prompt), config.sample_style, config.sample_subject
        return [
            View("together", Prompts(config.fill(config.full_prompt))),
            View(f"content, {style}", Prompts(f"{content} in {style} style"), off=("style",)),
            View(f"style, {subject}", Prompts(config.fill(f"a {subject} in {{token}} style")), off=("content",)),
        ]

    def off(self, names: tuple[str, ...]) -> AbstractContextManager[None]:
        """Switch LoRAs off."""
        return switched_off(*(self.branches[name] for name in names))


def train_blora(
    config: BLoraConfig, resume: bool = False, progress: Callback | None = None, base: Base | None = None
) -> RunFolder:
    """Train a content and a style LoRA in blocks of their own and write them into a run folder.

    Arguments and errors are those of `run_training`.
    """
    return run_training(BLora, config, resume, progress, base)
