"""B-LoRA (arXiv 2403.14572, section 4): one training with one prompt gives two LoRAs, in separate blocks.

The LoRAs sit on the attentions of two blocks of SDXL's UNet: content in `up_blocks.0.attentions.0` (W4 in the paper),
style in `up_blocks.0.attentions.1` (W5). Both train together on the denoising loss with the prompt "A [v]". The blocks
alone separate them: each half is a LoRA on its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, ClassVar

from torch import Tensor

from unziplora.config.blora import BLoraConfig
from unziplora.config.recipe import KINDS
from unziplora.errors import UserError
from unziplora.lora.blocks import check_blocks, read_blocks
from unziplora.lora.inject import attention_linears, filter_targets
from unziplora.methods.adapters import (
    AdapterMethod,
    TrainingData,
    check_block_map,
    matrices,
    new_branches,
    pair_views,
)
from unziplora.methods.data import image_examples
from unziplora.models.base import Base
from unziplora.models.text import Prompts
from unziplora.runs.model_card import LoraDescription, RunDescription, image_count
from unziplora.training.loss import generator
from unziplora.training.method import Setup, View
from unziplora.training.runner import run_training


class BLora(AdapterMethod[BLoraConfig, TrainingData]):
    """A content and a style LoRA in blocks of their own."""

    command: ClassVar[str] = "train blora"

    def add_loras(self) -> None:
        paths = attention_linears(self.unet)
        check_blocks(read_blocks(self.config.blocks), paths)
        layers = self.layers(self.config, paths)
        self.branches = {name: new_branches(self.unet, name, layers[name], self.config) for name in KINDS}

    @classmethod
    def check(cls, config: BLoraConfig, base: Base | None = None) -> None:
        blocks = read_blocks(config.blocks)
        if not (blocks.content and blocks.style):
            raise UserError(f"{config.blocks}: B-LoRA needs a block for the content and one for the style")
        check_block_map(config.blocks, ["attention"], config.base, base)
        Prompts(*map(config.fill, (config.full_prompt, config.content_prompt, config.style_prompt)))

    @classmethod
    def layers(cls, config: BLoraConfig, paths: list[str]) -> dict[str, list[str]]:
        blocks, attention = read_blocks(config.blocks), filter_targets(paths, ["attention"])
        return {name: [path for path in attention if blocks.owner(path) == name] for name in KINDS}

    @classmethod
    def build(cls, config: BLoraConfig, setup: Setup) -> BLora:
        examples = image_examples(setup, config, Prompts(config.fill(config.full_prompt)))
        setup.make_room(config)
        data = TrainingData(examples, images=setup.images.of())
        return cls(setup.base.unet, setup.noise_schedule(), data, config, setup.autocast)

    @classmethod
    def describe(cls, config: BLoraConfig) -> RunDescription:
        content, style = config.fill(config.content_prompt), config.style_trigger(config.style_prompt, "{token}")
        return RunDescription(
            method="B-LoRA (arXiv 2403.14572)",
            origin=f"Two LoRAs trained on {image_count(config)}",
            prompt=config.fill(config.full_prompt),
            files={
                "content": LoraDescription("the content", content, "Its blocks hold no style."),
                "style": LoraDescription("the style", style, "Its blocks hold no content."),
            },
        )

    def parameter_groups(self) -> list[dict[str, Any]]:
        params, config = matrices(*self.branches.values()), self.config
        return [{"name": "unet", "params": params, "lr": config.learning_rate, "weight_decay": config.weight_decay}]

    def losses(self, step: int) -> Iterator[Tensor]:
        yield self.denoising_loss(self.data.examples, generator(self.config.seed, "train", step))

    def views(self) -> list[View]:
        config = self.config
        full, content = config.fill(config.full_prompt), config.fill(config.content_prompt)
        return pair_views(config, Prompts(full), content, "{token}")


train_blora = partial(run_training, BLora)
"""Train a content and a style LoRA in blocks of their own and write them into a run folder (`run_training`)."""
