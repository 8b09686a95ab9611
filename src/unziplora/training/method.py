"""What a method offers: it is built from a recipe, says its losses, and exports its LoRAs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Generic, TypeVar

from PIL import Image
from torch import Tensor

from unziplora.lora.weights import Lora
from unziplora.methods.adapters import Setup, View
from unziplora.runs.model_card import About

C = TypeVar("C")


class Trainable(ABC):
    """What the training loop asks of a method."""

    @abstractmethod
    def parameter_groups(self) -> list[dict[str, Any]]:
        """Optimiser groups with a name each."""

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
        pictures: what it learns from, the first one for the sample sheet; may be empty.
    """

    command: ClassVar[str]
    pictures: list[Image.Image]

    @classmethod
    def check(cls, config: C) -> None:
        """Refuse what can be seen to be wrong before a folder is made and a base is loaded; nothing, by default."""
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
    def about(cls, config: C) -> About:
        """What the card and the files' headers tell."""

    @abstractmethod
    def views(self) -> list[View]:
        """The columns of the sample sheet."""

    @abstractmethod
    def off(self, names: tuple[str, ...]) -> AbstractContextManager[None]:
        """Have LoRAs of these names switched off for a while."""
