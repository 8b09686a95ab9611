"""Two cases at the tiny base's size, a measure by hand, and a method that counts."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import tiny
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from unziplora.bench.cases import Case, Example
from unziplora.bench.contenders import Adapters
from unziplora.bench.workspace import Workspace
from unziplora.config.training import TrainingConfig
from unziplora.lora.weights import Lora
from unziplora.models.base import Base
from unziplora.models.text import Prompts


def solid(red: int, green: int, blue: int = 0) -> Image.Image:
    return Image.new("RGB", (64, 64), (red, green, blue))


def make_case(slug: str, partner: str, hue: int) -> Case:
    """Two targets, one other concept; red stands for content, green for style."""
    return Case(
        slug=slug,
        content=slug,
        style="ink",
        image=solid(hue, 40),
        targets=(Example("neon sign", (solid(hue, 90),)), Example("oil", (solid(hue, 160),))),
        others=(Example("key", (solid(5, 40), solid(6, 40))),),
        partner=partner,
        mix=solid(hue, 41),
        oracle_content=(Example("oil", (solid(hue, 161),)),),
        oracle_style=(Example("bell", (solid(7, 40),)), Example("hat", (solid(8, 40),))),
    )


def make_cases() -> dict[str, Case]:
    """Return two cases, each the partner of the other."""
    return {"cat": make_case("cat", "dog", 200), "dog": make_case("dog", "cat", 120)}


def draw(base: Base, prompts: Prompts, seeds: Sequence[int], settings: object = None) -> list[Image.Image]:
    """Draw colors that depend on prompts and seed, in the place of `generate`."""
    digests = [hashlib.sha256(f"{prompts} {seed}".encode()).digest() for seed in seeds]
    return [solid(*digest[:3]) for digest in digests]


class Colors:
    """Content and concept from the mean of red, style from the mean of green, as angles."""

    def __init__(self, name: str = "colors") -> None:
        self.name, self.asked = name, 0

    def content(self, images: Sequence[Image.Image]) -> Tensor:
        self.asked += 1
        return self._angles(images, 0)

    def concept(self, images: Sequence[Image.Image]) -> Tensor:
        return self._angles(images, 2)

    def style(self, images: Sequence[Image.Image]) -> Tensor:
        return self._angles(images, 1)

    @staticmethod
    def _angles(images: Sequence[Image.Image], channel: int) -> Tensor:
        means = [sum(one.getchannel(channel).tobytes()) / (one.width * one.height * 255) for one in images]
        angles = torch.tensor(means) * torch.pi / 2
        return F.normalize(torch.stack([angles.cos(), angles.sin()], dim=1), dim=1)


@dataclass
class Fake:
    """A method with random LoRAs, which counts what is trained."""

    unet: torch.nn.Module
    name: str = "fake"
    seeded: bool = True
    steps: int = 1
    trained: list[tuple[str, int]] = field(default_factory=list)

    def recipes(self, workspace: Workspace, case: Case, seed: int) -> list[TrainingConfig]:
        return [TrainingConfig(out=workspace.run_folder(self.name, case, seed), steps=self.steps, seed=seed)]

    def train(self, workspace: Workspace, case: Case, seed: int) -> Adapters:
        self.trained.append((case.slug, seed))
        content, style = (Lora(tiny.random_lora(self.unet, 2 * seed + n)) for n in (0, 1))
        return Adapters(content, style, prompts=("a {token} {content}", "an image in {style} style"))

    def mix(self, workspace: Workspace, case: Case, partner: Case, seed: int) -> Adapters:
        mine = self.train(workspace, case, seed)
        return Adapters(mine.content, mine.style, prompts=mine.prompts)
