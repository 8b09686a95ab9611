"""What the benchmark asks of a method, and what a method gives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

from unziplora.bench.cases import Case
from unziplora.bench.workspace import Workspace
from unziplora.config.training import TrainingConfig
from unziplora.lora.weights import Lora


@dataclass(frozen=True)
class Adapters:
    """What a method has made of a picture, or of two.

    Attributes:
        content: what gives the content alone.
        style: what gives the style alone.
        merged: both in one LoRA; None: both are mounted together.
        prompts: templates of what content and style LoRA see where both are together; None: one prompt for both.
        subject: template of the words that call the content up.
        manner: template of the words that call the style up, before "style".
    """

    content: Lora | None = None
    style: Lora | None = None
    merged: Lora | None = None
    prompts: tuple[str, str] | None = None
    subject: str = "a {token} {content}"
    manner: str = "{style}"


class Contender(Protocol):
    """How LoRAs come about; every training is kept in the workplace and done once."""

    @property
    def name(self) -> str:
        """Its name in tables and folders."""

    @property
    def seeded(self) -> bool:
        """Whether a training seed makes a difference."""

    def recipes(self, place: Workspace, case: Case, seed: int) -> list[TrainingConfig]:
        """All that is trained for one case, resolved."""

    def train(self, place: Workspace, case: Case, seed: int) -> Adapters:
        """The LoRAs of one case."""

    def mix(self, place: Workspace, case: Case, partner: Case, seed: int) -> Adapters:
        """The content of one case with the style of another."""


@dataclass(frozen=True)
class Paired(ABC):
    """What methods share whose content and style LoRA are mounted together."""

    name: str
    seeded: ClassVar[bool] = True

    @abstractmethod
    def train(self, place: Workspace, case: Case, seed: int) -> Adapters:
        """The LoRAs of one case."""

    def mix(self, place: Workspace, case: Case, partner: Case, seed: int) -> Adapters:
        """The content LoRA of one case with the style LoRA of another."""
        mine, other = self.train(place, case, seed), self.train(place, partner, seed)
        return replace(mine, style=other.style)
