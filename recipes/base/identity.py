"""The networks that say which drawing, which thing and which style: ``python -m recipes.base.identity TOML``.

They learn from real pictures only, by supervised contrast (Khosla et al., arXiv 2004.11362): rows of the same
drawing, the same kind of thing or the same style come close, all others apart.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from recipes.base.config import Recipe, StageSettings
from recipes.base.dataset import Pictures
from recipes.base.grades import Grade
from recipes.base.identity_data import disturb, natural_and_filtered, open_world
from recipes.base.loop import Stage, Stop, adamw, train
from unziplora.metrics.measures import WEIGHTS
from unziplora.metrics.networks import ShapeNet, StyleNet

VAE = Path("src/unziplora/bundled/emoji-xl/vae")


class IdentitySettings(StageSettings):
    """How the networks learn."""

    lr: float = 2e-3
    warmup: int = 50
    cooldown: float = 0.6
    width: int = 32
    temperature: float = 0.1
    groups: int = 14
    """Concepts, or styles, in a batch."""
    drawings: int = 3
    """Drawings of each concept in a batch: pictures of two of them are the hard negatives of the third's."""
    each: int = 3
    """Pictures of each drawing, or of each style."""


SHAPE = IdentitySettings(steps=650, batch=14 * 3 * 3)
STYLE = IdentitySettings(steps=500, batch=16 * 6, width=24, groups=16, each=6)


def supcon(rows: Tensor, same: Tensor, ignored: Tensor | None = None, temperature: float = 0.1) -> Tensor:
    """Supervised contrastive loss (arXiv 2004.11362, eq. 2) of rows [N, D] of unit length.

    Args:
        rows: the embeddings.
        same: which pairs should be close, bool [N, N]; the diagonal does not matter.
        ignored: which pairs count neither as close nor as apart, bool [N, N].
        temperature: what similarities are divided by.
    """
    away = torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    if ignored is not None:
        away = away | ignored
    similar = (rows @ rows.T / temperature).masked_fill(away, -torch.inf)
    positive = same & ~away
    chance = similar.log_softmax(1).masked_fill(~positive, 0)
    count = positive.sum(1)
    return -(chance.sum(1)[count > 0] / count[count > 0]).mean()


def equal(labels: list[object]) -> Tensor:
    """Which labels are equal, bool [N, N]."""
    numbers = {label: i for i, label in enumerate(dict.fromkeys(labels))}
    codes = torch.tensor([numbers[label] for label in labels])
    return codes[:, None] == codes


class IdentityStage(Stage):
    """What both networks share: the pictures and how a batch of them is painted."""

    settings: IdentitySettings

    def __init__(
        self, recipe: Recipe, pictures: Pictures, settings: IdentitySettings, net: type[ShapeNet] | type[StyleNet]
    ):
        super().__init__(recipe)
        self.settings, self.pictures = settings, pictures
        sets = open_world(recipe).sets
        self.drawn = [(sets[item.drawing]["drawings"], item.concept) for item in pictures.items]
        """Which drawing each picture shows; related sets share drawings."""
        torch.manual_seed(recipe.seed)
        self.net = net(settings.width).to(self.device)
        self.modules = {"net": self.net}
        self.optimizer = adamw(self.modules, settings.lr, weight_decay=0.05)

    def paint(self, chosen: list[int], grades: list[Grade], rng: np.random.Generator) -> Tensor:
        """Graded, disturbed pictures [N, 3, R, R] in −1…1."""
        graded = [
            grade.apply(self.pictures.pixels[i].astype(np.float32) / 255, rng)
            for i, grade in zip(chosen, grades, strict=True)
        ]
        pixels = torch.from_numpy(np.stack(graded)).float().permute(0, 3, 1, 2) * 2 - 1
        return disturb(pixels, rng).to(self.device)


class ShapeStage(IdentityStage):
    """Content and concept: a few drawings each of a few concepts, each in several styles."""

    def __init__(self, recipe: Recipe, pictures: Pictures, settings: IdentitySettings = SHAPE):
        self.name = "shape"
        super().__init__(recipe, pictures, settings, ShapeNet)
        self.index: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
        for i, (group, concept) in enumerate(self.drawn):
            self.index[concept][group].append(i)
        self.concepts = sorted(self.index)

    def choose(self, rng: np.random.Generator) -> list[int]:
        """Indices of a batch."""
        s, chosen = self.settings, []
        for c in rng.choice(len(self.concepts), min(s.groups, len(self.concepts)), replace=False):
            groups = self.index[self.concepts[c]]
            rich = [g for g, found in groups.items() if len(found) >= s.each]
            for g in rng.choice(rich, min(s.drawings, len(rich)), replace=False):
                chosen += rng.choice(groups[g], s.each, replace=False).tolist()
        return chosen

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        rng = self.draw(step)
        chosen = self.choose(rng)
        grades = [Grade.draw(rng) if rng.random() < 0.6 else Grade.none() for _ in chosen]
        pixels = self.paint(chosen, grades, rng)
        drawing = equal([self.drawn[i] for i in chosen]).to(self.device)
        concept = equal([self.drawn[i][1] for i in chosen]).to(self.device)
        with torch.autocast(self.device.type, enabled=False):
            shown, thing = self.net(pixels)
            content = supcon(shown, drawing, temperature=self.settings.temperature)
            kind = supcon(thing, concept, drawing, self.settings.temperature)
        return content + kind, {"content": content.item(), "concept": kind.item()}


class StyleStage(IdentityStage):
    """Style: a few styles, two of each filter or set in other grades, on drawings that all of them share."""

    pool = 40
    """Concepts that a batch draws from: the same things in many styles, so that things say nothing."""

    def __init__(self, recipe: Recipe, pictures: Pictures, settings: IdentitySettings = STYLE):
        self.name = "style"
        super().__init__(recipe, pictures, settings, StyleNet)
        self.index: dict[str, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
        for i, item in enumerate(pictures.items):
            self.index[item.style][item.variant].append(i)
        self.styles = sorted(self.index)
        self.concepts = np.array([item.concept for item in pictures.items])

    def choose(self, rng: np.random.Generator) -> tuple[list[int], list[int], list[Grade]]:
        """Indices of a batch, the style class of each and its grade."""
        s = self.settings
        pool = rng.choice(np.unique(self.concepts), self.pool)
        chosen, classes, grades = [], [], []
        for name in rng.choice(self.styles, s.groups // 2, replace=len(self.styles) < s.groups // 2):
            variants = self.index[name]
            for grade in (Grade.none() if rng.random() < 0.5 else Grade.draw(rng), Grade.draw(rng)):
                every = variants[int(rng.choice(list(variants)))]
                shared = [i for i in every if self.concepts[i] in pool]
                source = shared if len(shared) >= s.each else every
                chosen += rng.choice(source, s.each, replace=len(source) < s.each).tolist()
                classes += [len(classes) // s.each] * s.each
                grades += [grade] * s.each
        return chosen, classes, grades

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        rng = self.draw(step)
        chosen, classes, grades = self.choose(rng)
        pixels = self.paint(chosen, grades, rng)
        same = equal(list(classes)).to(self.device)
        with torch.autocast(self.device.type, enabled=False):
            loss = supcon(self.net(pixels), same, temperature=self.settings.temperature)
        return loss, {"loss": loss.item()}


def write(stage: IdentityStage, folder: Path) -> None:
    """Write a network in fp16."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {key: value.half().contiguous().cpu() for key, value in stage.net.state_dict().items()}
    save_file(weights, folder / f"{stage.name}.safetensors", {"width": str(stage.settings.width)})


def main() -> None:
    """Train both networks and write them."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--output", type=Path, default=Path(".work/identity"), help="for pictures and checkpoints")
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--only", choices=["shape", "style"])
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    recipe = Recipe.read(asked.recipe).model_copy(update={"output": asked.output})
    torch.set_num_threads(asked.threads)
    pictures, stop = natural_and_filtered(recipe, VAE), Stop()
    for kind in (ShapeStage, StyleStage):
        stage = kind(recipe, pictures)
        if asked.only in (None, stage.name) and train(stage, stop):
            write(stage, asked.weights)


if __name__ == "__main__":
    main()
