"""DreamBooth as LoRA (arXiv 2208.12242, 2106.09685): one LoRA for what some pictures show, or how they show it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from PIL import Image
from torch import Tensor, nn

from unziplora.config.dreambooth import DreamBoothConfig
from unziplora.lora.inject import filter_targets, target_linears
from unziplora.lora.weights import Lora
from unziplora.methods.adapters import branch_state, folded, load_branch_state, matrices, new_branches, switched_off
from unziplora.methods.data import class_examples, image_examples, load_images
from unziplora.models.base import Base
from unziplora.models.text import Prompts
from unziplora.runs.folder import RunFolder
from unziplora.runs.model_card import About, File, image_count
from unziplora.training.loss import Examples, denoising_loss, generator
from unziplora.training.method import Method, Setup, View
from unziplora.training.runner import run_training
from unziplora.training.text_encoder_lora import TextLora
from unziplora.utils.progress import Callback

GIVES = {"content": "the content", "style": "the style", "lora": "content and style in one"}


class DreamBooth(Method[DreamBoothConfig]):
    """One LoRA on a UNet, if asked for another on the text encoders, and what a job asks of a method.

    Attributes:
        branches: the UNet's branches by module path.
        text: the text encoders' LoRA, or None.
    """

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
        pictures: Sequence[Image.Image] = (),
    ) -> None:
        """Inject the LoRA into the UNet, in place.

        Args:
            unet: frozen, without LoRAs.
            scheduler: says how noise is added and what is predicted.
            examples: the pictures with the conditioning of their prompts.
            config: the recipe.
            prior: class pictures with their conditioning, where the prior is preserved.
            text: the text encoders' LoRA; it then says the conditioning anew in every step.
            autocast: context of the forward passes.
            pictures: what the examples were made from, for the sample sheet.
        """
        self.unet, self.scheduler, self.examples, self.config = unet, scheduler, examples, config
        self.predict = unet
        self.prior, self.text, self.autocast, self.pictures = prior, text, autocast, list(pictures)
        self.branches = new_branches(unet, config.product, target_linears(unet, config.targets), config)

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
        """One LoRA on the layers that are asked for."""
        return {config.product: filter_targets(paths, config.targets)}

    @classmethod
    def build(cls, config: DreamBoothConfig, setup: Setup) -> DreamBooth:
        """Encode pictures and class pictures once, then inject the LoRA."""
        pictures, prompts = load_images(config, setup.size), config.image_prompts()
        examples, prior, text = image_examples(setup, config, pictures, prompts), None, None
        class_prompt = config.fill(config.class_prompt or "")
        if config.prior:
            prior = class_examples(setup, config, Prompts(class_prompt), config.prior_images, config.class_folder)
        if config.text_encoders:
            text = TextLora(setup.base, config, prompts, [class_prompt] * config.prior_images if prior else [])
        setup.make_room(config, keep_text=text is not None)
        unet, scheduler = setup.base.unet, setup.noise_schedule()
        return cls(unet, scheduler, examples, config, prior, text, setup.autocast, pictures)

    @classmethod
    def about(cls, config: DreamBoothConfig) -> About:
        """One LoRA."""
        prompt = config.image_prompts()[0]
        trigger = config.style_trigger(config.prompts[0]) if config.product == "style" else prompt
        return About(
            method="DreamBooth LoRA (arXiv 2208.12242)",
            made=f"A LoRA trained on {image_count(config)}",
            prompt=prompt,
            files={config.product: File(GIVES[config.product], trigger)},
        )

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Optimizer groups, named: the UNet's matrices, and the text encoders'."""
        config = self.config
        unet = {"name": "unet", "params": matrices(self.branches), "lr": config.learning_rate}
        groups: list[dict[str, Any]] = [unet]
        if self.text is not None:
            groups.append({"name": "text", "params": self.text.parameters(), "lr": config.text_learning_rate})
        return [{**group, "weight_decay": config.weight_decay} for group in groups]

    def losses(self, step: int) -> Iterator[Tensor]:
        """The denoising error on the pictures, and λ times that on the class pictures, scalars."""
        yield self._loss(self.examples, "train", step)
        if self.prior is not None:
            yield self.config.prior * self._loss(self.prior, "prior", step)

    def _loss(self, examples: Examples, purpose: str, step: int) -> Tensor:
        draw, noising = generator(self.config.seed, purpose, step), self.config.noising()
        with self.autocast():
            conditioning = None if self.text is None else self.text.read(examples, prior=purpose == "prior")
            return denoising_loss(
                self.predict, self.scheduler, examples, draw=draw, conditioning=conditioning, **noising
            )

    def state_dict(self) -> dict[str, Tensor]:
        """Everything of the method that a checkpoint needs, by name."""
        state = branch_state(self.branches, "unet")
        return state if self.text is None else {**state, **self.text.state_dict()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over the state of a checkpoint of the same recipe."""
        load_branch_state(self.branches, "unet", state)
        if self.text is not None:
            self.text.load_state_dict(state)

    @torch.no_grad()
    def export(self) -> dict[str, Lora]:
        """The LoRA as plain pairs, alpha folded into B."""
        text = {} if self.text is None else self.text.export()
        return {self.config.product: Lora(folded(self.branches), text=text)}

    def views(self) -> list[View]:
        """As trained; then a content in another style, or a style on another subject."""
        config, prompt = self.config, self.config.image_prompts()[0]
        views = [View("as trained", Prompts(prompt))]
        if config.product == "content":
            views.append(View(f"in {config.sample_style}", Prompts(f"{prompt} in {config.sample_style} style")))
        if config.product == "style":
            text = config.fill(f"a {config.sample_subject} in {{style}} style")
            views.append(View(config.sample_subject, Prompts(text)))
        return views

    def off(self, names: tuple[str, ...]) -> AbstractContextManager[None]:
        """Switch the LoRA off, if it is named."""
        return switched_off(*([self.branches] if self.config.product in names else []))


def train_dreambooth(
    config: DreamBoothConfig, resume: bool = False, progress: Callback | None = None, base: Base | None = None
) -> RunFolder:
    """Train one LoRA on the configured images and write it into a run folder.

    Arguments and errors are those of `run_training`.
    """
    return run_training(DreamBooth, config, resume, progress, base)
