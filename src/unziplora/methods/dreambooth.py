"""DreamBooth as LoRA (arXiv 2208.12242, 2106.09685): one LoRA of the subject or the style that some images show.

The loss is the denoising error on the images with a prompt such as "a [identifier] cat", plus λ times the same error
on class images, which the base generates beforehand from "a cat" (prior preservation, section 3.2).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, ClassVar

from torch import Tensor

from unziplora.config.dreambooth import DreamBoothConfig
from unziplora.config.templates import in_style
from unziplora.errors import UserError
from unziplora.lora.inject import filter_targets, target_layers
from unziplora.methods.adapters import AdapterMethod, TrainingData, matrices, new_branches
from unziplora.methods.data import class_examples, image_examples
from unziplora.models.base import Base
from unziplora.models.text import Prompts
from unziplora.runs.model_card import LoraDescription, RunDescription, image_count
from unziplora.training.loss import Examples, generator
from unziplora.training.method import Setup, View
from unziplora.training.runner import run_training
from unziplora.training.text_encoder_lora import TextLora

PRODUCTS = {"content": "the content", "style": "the style", "lora": "content and style in one"}
"""Descriptions of the file for the card, by its name."""


class DreamBooth(AdapterMethod[DreamBoothConfig, TrainingData]):
    """One LoRA, named after `config.product`, on a UNet and optionally on the text encoders."""

    command: ClassVar[str] = "train dreambooth"

    def add_loras(self) -> None:
        name, config = self.config.product, self.config
        self.branches = {name: new_branches(self.unet, name, target_layers(self.unet, config.targets), config)}
        self.text = {name: self.data.text} if self.data.text else {}

    @classmethod
    def check(cls, config: DreamBoothConfig, base: Base | None = None) -> None:
        for text in (*config.image_prompts(), config.fill(config.class_prompt or "")):
            Prompts(text)
        if config.prior and config.class_folder and config.class_folder.expanduser().is_file():
            raise UserError(f"{config.class_folder}: class_folder is a file; name a folder of class images")

    @classmethod
    def layers(cls, config: DreamBoothConfig, paths: list[str]) -> dict[str, list[str]]:
        return {config.product: filter_targets(paths, config.targets)}

    @classmethod
    def build(cls, config: DreamBoothConfig, setup: Setup) -> DreamBooth:
        prompts = config.image_prompts()
        examples, priors, text = image_examples(setup, config, prompts), {}, None
        class_prompt = config.fill(config.class_prompt or "")
        if config.prior:
            prompt = Prompts(class_prompt)
            prior = class_examples(setup, config, prompt, config.prior_images, config.class_folder)
            priors[config.product] = prior
        if config.text_encoders:  # prompts are encoded again in every step
            text = TextLora(setup.base, config, prompts, [class_prompt] * config.prior_images if priors else [])
        setup.make_room(config, keep_text=text is not None)
        data = TrainingData(examples, priors=priors, text=text, images=setup.images.of())
        return cls(setup.base.unet, setup.noise_schedule(), data, config, setup.autocast)

    @classmethod
    def describe(cls, config: DreamBoothConfig) -> RunDescription:
        prompt = config.image_prompts()[0]
        trigger = config.style_trigger(config.prompts[0]) if config.product == "style" else prompt
        return RunDescription(
            method="DreamBooth LoRA (arXiv 2208.12242)",
            origin=f"A LoRA trained on {image_count(config)}",
            prompt=prompt,
            files={config.product: LoraDescription(PRODUCTS[config.product], trigger)},
        )

    def parameter_groups(self) -> list[dict[str, Any]]:
        config = self.config
        params = matrices(*self.branches.values())
        groups: list[dict[str, Any]] = [{"name": "unet", "params": params, "lr": config.learning_rate}]
        for text in self.text.values():
            groups.append({"name": "text", "params": text.parameters(), "lr": config.text_learning_rate})
        return [{**group, "weight_decay": config.weight_decay} for group in groups]

    def losses(self, step: int) -> Iterator[Tensor]:
        """Yield the denoising error on the images, then λ times that on the class images, scalars."""
        yield self._loss(self.data.examples, "train", step)
        for prior in self.data.priors.values():
            yield self.config.prior * self._loss(prior, "prior", step)

    def _loss(self, examples: Examples, purpose: str, step: int) -> Tensor:
        text = self.data.text
        conditioning = text.read(examples, prior=purpose == "prior") if text else None
        return self.denoising_loss(examples, generator(self.config.seed, purpose, step), conditioning=conditioning)

    def views(self) -> list[View]:
        """Return the training prompt; then a content in another style, or a style on another subject."""
        config, prompt = self.config, self.config.image_prompts()[0]
        views = [View("as trained", Prompts(prompt))]
        if config.product == "content":
            views.append(View(f"in {config.sample_style}", Prompts(in_style(prompt, config.sample_style))))
        if config.product == "style":
            text = config.fill(f"a {config.sample_subject} in {{style}} style")
            views.append(View(config.sample_subject, Prompts(text)))
        return views


train_dreambooth = partial(run_training, DreamBooth)
"""Train one LoRA on the configured images and write it into a run folder (`run_training`)."""
