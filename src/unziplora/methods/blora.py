"""B-LoRA (arXiv 2403.14572): one training with one prompt gives a content and a style LoRA, in separate blocks.

The LoRAs sit on the attentions of two blocks of SDXL's UNet: content in `up_blocks.0.attentions.0` (W4 in the paper),
style in `up_blocks.0.attentions.1` (W5). Both train together on the denoising loss with the prompt "A [v]". The blocks
alone separate them: each half is a LoRA on its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from PIL import Image
from torch import Tensor, nn

from unziplora.config.blora import BLoraConfig
from unziplora.config.recipe import KINDS
from unziplora.errors import UserError
from unziplora.lora.blocks import check_blocks, read_blocks
from unziplora.lora.inject import attention_linears, filter_targets
from unziplora.methods.adapters import AdapterMethod, matrices, new_branches, pair_views
from unziplora.methods.data import image_examples, load_images
from unziplora.models.base import Base
from unziplora.models.text import Prompts
from unziplora.runs.folder import RunFolder
from unziplora.runs.model_card import LoraDescription, RunDescription, image_count
from unziplora.training.loss import Examples, generator
from unziplora.training.method import Setup, View
from unziplora.training.runner import run_training
from unziplora.utils.progress import Callback


class BLora(AdapterMethod[BLoraConfig]):
    """A content and a style LoRA in blocks of their own."""

    command: ClassVar[str] = "train blora"

    def __init__(
        self,
        unet: nn.Module,
        scheduler: DDPMScheduler,
        examples: Examples,
        config: BLoraConfig,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        images: Sequence[Image.Image] = (),
    ) -> None:
        """Add both LoRAs to the UNet.

        Args:
            examples: the images with the conditioning of the prompt; for the others see `AdapterMethod`.

        Raises:
            UserError: the block map names a block that this UNet does not have.
        """
        super().__init__(unet, scheduler, config, autocast, images)
        self.examples = examples
        paths = attention_linears(unet)
        check_blocks(read_blocks(config.blocks), paths)
        self.branches = {
            name: new_branches(unet, name, own, config) for name, own in self.layers(config, paths).items()
        }

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
        """Return the attentions of each LoRA's blocks."""
        blocks, attention = read_blocks(config.blocks), filter_targets(paths, ["attention"])
        return {name: [path for path in attention if blocks.owner(path) == name] for name in KINDS}

    @classmethod
    def build(cls, config: BLoraConfig, setup: Setup) -> BLora:
        """Encode images and prompt once, then add both LoRAs to the base's UNet."""
        images, prompts = load_images(config, setup.size), Prompts(config.fill(config.full_prompt))
        examples = image_examples(setup, config, images, prompts)
        setup.make_room(config)
        return cls(setup.base.unet, setup.noise_schedule(), examples, config, setup.autocast, images)

    @classmethod
    def describe(cls, config: BLoraConfig) -> RunDescription:
        """Describe two LoRAs from one training."""
        style = config.style_trigger(config.style_prompt, "{token}")
        return RunDescription(
            method="B-LoRA (arXiv 2403.14572)",
            origin=f"Two LoRAs trained on {image_count(config)}",
            prompt=config.fill(config.full_prompt),
            files={
                "content": LoraDescription(
                    "the content", config.fill(config.content_prompt), "Its blocks hold no style."
                ),
                "style": LoraDescription("the style", style, "Its blocks hold no content."),
            },
        )

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return one optimizer group: the matrices of both LoRAs."""
        params, config = matrices(*self.branches.values()), self.config
        return [{"name": "unet", "params": params, "lr": config.learning_rate, "weight_decay": config.weight_decay}]

    def losses(self, step: int) -> Iterator[Tensor]:
        """Yield the denoising error with both LoRAs, a scalar."""
        yield self.denoising_loss(self.examples, generator(self.config.seed, "train", step))

    def views(self) -> list[View]:
        """Return both together and each alone (`pair_views`)."""
        config = self.config
        full, content = config.fill(config.full_prompt), config.fill(config.content_prompt)
        return pair_views(config, Prompts(full), content, "{token}")


def train_blora(
    config: BLoraConfig, resume: bool = False, progress: Callback | None = None, base: Base | None = None
) -> RunFolder:
    """Train a content and a style LoRA in blocks of their own and write them into a run folder.

    Arguments and errors are those of `run_training`.
    """
    return run_training(BLora, config, resume, progress, base)
