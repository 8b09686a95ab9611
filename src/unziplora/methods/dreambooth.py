"""DreamBooth as LoRA (arXiv 2208.12242, 2106.09685): one LoRA of the subject or the style that some images show.

The loss is the denoising error on the images with a prompt such as "a [identifier] cat", plus λ times the same error
on class images, which the base generates beforehand from "a cat" (prior preservation, section 3.2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from PIL import Image
from torch import Tensor, nn

from unziplora.config.dreambooth import DreamBoothConfig
from unziplora.lora.inject import filter_targets, target_linears
from unziplora.methods.adapters import AdapterMethod, matrices, new_branches
from unziplora.methods.data import class_examples, image_examples, load_images
from unziplora.models.base import Base
from unziplora.models.text import Prompts
from unziplora.runs.folder import RunFolder
from unziplora.runs.model_card import LoraDescription, RunDescription, image_count
from unziplora.training.loss import Examples, generator
from unziplora.training.method import Setup, View
from unziplora.training.runner import run_training
from unziplora.training.text_encoder_lora import TextLora
from unziplora.utils.progress import Callback

PRODUCTS = {"content": "the content", "style": "the style", "lora": "content and style in one"}
"""Descriptions of the file for the card, by its name."""


class DreamBooth(AdapterMethod[DreamBoothConfig]):
    """One LoRA, named after `config.product`, on a UNet and optionally on the text encoders."""

    command: ClassVar[str] = "train dreambooth"

    def __init__(
        self,
        unet: nn.Module,
        scheduler: DDPMScheduler,
        examples: Examples,
        config: DreamBoothConfig,
        prior: Examples | None = None,
        text: TextLora | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        images: Sequence[Image.Image] = (),
    ) -> None:
        """Add the LoRA to the UNet; for the other arguments see `AdapterMethod`.

        Args:
            examples: the images with the conditioning of their prompts.
            prior: class images with their conditioning, for prior preservation.
            text: the text encoders' LoRA; prompts are then encoded again in every step.
        """
        super().__init__(unet, scheduler, config, autocast, images)
        self.examples, self.prior = examples, prior
        paths = target_linears(unet, config.targets)
        self.branches = {config.product: new_branches(unet, config.product, paths, config)}
        self.text = {config.product: text} if text else {}

    @classmethod
    def check(cls, config: DreamBoothConfig, base: Base | None = None) -> None:
        """Fill in the prompts.

        Raises:
            UserError: one is not usable.
        """
        for text in (*config.image_prompts(), config.fill(config.class_prompt or "")):
            Prompts(text)

    @classmethod
    def layers(cls, config: DreamBoothConfig, paths: list[str]) -> dict[str, list[str]]:
        """Return the configured kinds of layers."""
        return {config.product: filter_targets(paths, config.targets)}

    @classmethod
    def build(cls, config: DreamBoothConfig, setup: Setup) -> DreamBooth:
        """Encode images and class images once, then add the LoRA to the base."""
        images, prompts = load_images(config, setup.size), config.image_prompts()
        examples, prior, text = image_examples(setup, config, images, prompts), None, None
        class_prompt = config.fill(config.class_prompt or "")
        if config.prior:
            prior = class_examples(setup, config, Prompts(class_prompt), config.prior_images, config.class_folder)
        if config.text_encoders:
            text = TextLora(setup.base, config, prompts, [class_prompt] * config.prior_images if prior else [])
        setup.make_room(config, keep_text=text is not None)
        return cls(setup.base.unet, setup.noise_schedule(), examples, config, prior, text, setup.autocast, images)

    @classmethod
    def describe(cls, config: DreamBoothConfig) -> RunDescription:
        """Describe one LoRA."""
        prompt = config.image_prompts()[0]
        trigger = config.style_trigger(config.prompts[0]) if config.product == "style" else prompt
        return RunDescription(
            method="DreamBooth LoRA (arXiv 2208.12242)",
            origin=f"A LoRA trained on {image_count(config)}",
            prompt=prompt,
            files={config.product: LoraDescription(PRODUCTS[config.product], trigger)},
        )

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return named optimizer groups: the UNet's matrices, and the text encoders'."""
        config = self.config
        params = matrices(*self.branches.values())
        groups: list[dict[str, Any]] = [{"name": "unet", "params": params, "lr": config.learning_rate}]
        for text in self.text.values():
            groups.append({"name": "text", "params": text.parameters(), "lr": config.text_learning_rate})
        return [{**group, "weight_decay": config.weight_decay} for group in groups]

    def losses(self, step: int) -> Iterator[Tensor]:
        """Yield the denoising error on the images, then λ times that on the class images, scalars."""
        yield self._loss(self.examples, "train", step)
        if self.prior is not None:
            yield self.config.prior * self._loss(self.prior, "prior", step)

    def _loss(self, examples: Examples, purpose: str, step: int) -> Tensor:
        text = self.text.get(self.config.product)
        conditioning = text.read(examples, prior=purpose == "prior") if text else None
        return self.denoising_loss(examples, generator(self.config.seed, purpose, step), conditioning=conditioning)

    def views(self) -> list[View]:
        """Return the training prompt; then a content in another style, or a style on another subject."""
        config, prompt = self.config, self.config.image_prompts()[0]
        views = [View("as trained", Prompts(prompt))]
        if config.product == "content":
            views.append(View(f"in {config.sample_style}", Prompts(f"{prompt} in {config.sample_style} style")))
        if config.product == "style":
            text = config.fill(f"a {config.sample_subject} in {{style}} style")
            views.append(View(config.sample_subject, Prompts(text)))
        return views


def train_dreambooth(
    config: DreamBoothConfig, resume: bool = False, progress: Callback | None = None, base: Base | None = None
) -> RunFolder:
    """Train one LoRA on the configured images and write it into a run folder.

    Arguments and errors are those of `run_training`.
    """
    return run_training(DreamBooth, config, resume, progress, base)
