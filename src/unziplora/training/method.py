"""What a method offers: it is built from a recipe, says its losses, and exports its LoRAs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from PIL import Image
from torch import Tensor

from unziplora.config.training import TrainingConfig
from unziplora.lora.weights import Lora
from unziplora.models.base import Base
from unziplora.models.text import Prompts
from unziplora.runs.model_card import RunDescription
from unziplora.training.cuda_graphs import Predict

C = TypeVar("C")


class Trainable(ABC):
    """What the training loop asks of a method."""

    predict: Predict
    """The UNet, or its recorded passes while a run trains."""

    @abstractmethod
    def parameter_groups(self) -> list[dict[str, Any]]:
        """Optimizer groups with a name each."""

    def before_step(self, step: int, gradient_scale: float) -> None:
        """What is to be done before a step's losses; nothing, unless a method says so."""
        return

    @abstractmethod
    def losses(self, step: int) -> Iterator[Tensor]:
        """Terms of the loss; each is propagated before the next is asked for."""

    def after_backward(self, step: int) -> None:
        """Change gradients before they are clipped; nothing, unless a method says so."""
        return

    def after_step(self, step: int) -> None:
        """Put parameters back into their bounds; nothing, unless a method says so."""
        return

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """Everything a checkpoint needs."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state_dict`."""


class Method(Trainable, Generic[C]):
    """What a job asks of a method besides its training.

    Attributes:
        command: the command that runs it, for messages.
        images: training images, the first one for the sample sheet; may be empty.
    """

    command: ClassVar[str]
    images: list[Image.Image]

    @classmethod
    def check(cls, config: C, base: Base | None = None) -> None:
        """Refuse what can be seen to be wrong before a folder is made and a base is loaded; nothing, by default.

        Args:
            base: used instead of the configured one, if it is loaded already.
        """
        return

    @classmethod
    @abstractmethod
    def layers(cls, config: C, paths: list[str]) -> dict[str, list[str]]:
        """The layers that each LoRA adapts, by its name, of a UNet's linear layers at these paths."""

    @classmethod
    @abstractmethod
    def build(cls, config: C, setup: Setup) -> Method[C]:
        """Encode what is needed once and put the LoRAs into the base's UNet."""

    @abstractmethod
    def export(self) -> dict[str, Lora]:
        """The LoRAs by file name, in fp32, of strength 1."""

    @classmethod
    @abstractmethod
    def describe(cls, config: C) -> RunDescription:
        """Describe the LoRAs for the card and the headers of the files."""

    @abstractmethod
    def views(self) -> list[View]:
        """The columns of the sample sheet."""

    @abstractmethod
    def off(self, names: tuple[str, ...]) -> AbstractContextManager[None]:
        """Have LoRAs of these names switched off for a while."""


@dataclass(frozen=True)
class Setup:
    """What a method is built with.

    Attributes:
        base: frozen, without LoRAs.
        size: side of the training pictures in pixels.
        autocast: context of the forward passes.
        report: tells the user something worth a line.
        resumed: a checkpoint will be loaded next, with all that was learned before it.
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
