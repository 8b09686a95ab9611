"""Networks that identify drawings, concepts and styles: ``python -m recipes.base.identity TOML``.

They learn from real images only, by supervised contrast (Khosla et al., arXiv 2004.11362): embeddings of the same
drawing, concept or style move together, all others apart.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from recipes import run
from recipes.base.config import Recipe, StageSettings
from recipes.base.dataset import Images
from recipes.base.grades import Grade
from recipes.base.identity_data import disturb, natural_and_filtered, open_world
from recipes.base.loop import Stage, Stop, train
from recipes.base.optimizers import adamw
from unziplora.metrics.measures import WEIGHTS
from unziplora.metrics.networks import ShapeNet, StyleNet

VAE = Path("src/unziplora/models/bundled/emoji-xl/vae")


class IdentitySettings(StageSettings):
    """Settings of the networks' training."""

    lr: float = 2e-3
    warmup: int = 50
    cooldown: float = 0.6
    width: int = 32
    temperature: float = 0.1
    groups: int = 14
    """Concepts, or styles, in a batch."""
    drawings: int = 3
    """Drawings of each concept in a batch; each has the images of the others as hard negatives."""
    each: int = 3
    """Images of each drawing, or of each style."""


SHAPE = IdentitySettings(steps=650, batch=14 * 3 * 3)
STYLE = IdentitySettings(steps=500, batch=16 * 6, width=24, groups=16, each=6)


def supcon(rows: Tensor, same: Tensor, ignored: Tensor | None = None, temperature: float = 0.1) -> Tensor:
    """Compute the supervised contrastive loss (arXiv 2004.11362, eq. 2) of rows [N, D] of unit length.

    Args:
        rows: embeddings.
        same: pairs that should be close, bool [N, N]; the diagonal does not matter.
        ignored: pairs that count neither as close nor as apart, bool [N, N].
        temperature: divisor of the similarities.
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
    """Return the mask of equal labels, bool [N, N]."""
    numbers = {label: i for i, label in enumerate(dict.fromkeys(labels))}
    codes = torch.tensor([numbers[label] for label in labels])
    return codes[:, None] == codes


class IdentityStage(Stage):
    """Common part of both networks' training: the images, and their grades and disturbances."""

    settings: IdentitySettings

    def __init__(
        self, recipe: Recipe, images: Images, settings: IdentitySettings, net: type[ShapeNet] | type[StyleNet]
    ):
        super().__init__(recipe)
        self.settings, self.images = settings, images
        sets = open_world(recipe).sets
        self.drawn = [(sets[item.drawing]["drawings"], item.concept) for item in images.items]
        """Drawing that each image shows; related sets share drawings."""
        torch.manual_seed(recipe.seed)
        self.net = net(settings.width).to(self.device)
        self.modules = {"net": self.net}
        self.optimizer = adamw(self.modules, settings.lr, weight_decay=0.05)

    def paint(self, chosen: list[int], grades: list[Grade], rng: np.random.Generator) -> Tensor:
        """Return graded, disturbed images [N, 3, R, R] in −1…1."""
        graded = [
            grade.apply(self.images.pixels[i].astype(np.float32) / 255, rng)
            for i, grade in zip(chosen, grades, strict=True)
        ]
        pixels = torch.from_numpy(np.stack(graded)).float().permute(0, 3, 1, 2) * 2 - 1
        return disturb(pixels, rng).to(self.device)


class ShapeStage(IdentityStage):
    """Training of content and concept: a few drawings each of a few concepts, each in several styles."""

    def __init__(self, recipe: Recipe, images: Images, settings: IdentitySettings = SHAPE):
        self.name = "shape"
        super().__init__(recipe, images, settings, ShapeNet)
        self.index: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
        for i, (group, concept) in enumerate(self.drawn):
            self.index[concept][group].append(i)
        self.concepts = sorted(self.index)

    def choose(self, rng: np.random.Generator) -> list[int]:
        """Draw the indices of a batch."""
        s, chosen = self.settings, []
        for c in rng.choice(len(self.concepts), min(s.groups, len(self.concepts)), replace=False):
            groups = self.index[self.concepts[c]]
            rich = [g for g, members in groups.items() if len(members) >= s.each]
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
    """Training of style: a few styles, two of each filter or set in different grades, on drawings that all share."""

    pool = 40
    """Concepts per batch: the same ones in many styles, so that the concept does not give the style away."""

    def __init__(self, recipe: Recipe, images: Images, settings: IdentitySettings = STYLE):
        self.name = "style"
        super().__init__(recipe, images, settings, StyleNet)
        self.index: dict[str, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
        for i, item in enumerate(images.items):
            self.index[item.style][item.variant].append(i)
        self.styles = sorted(self.index)
        self.concepts = np.array([item.concept for item in images.items])

    def choose(self, rng: np.random.Generator) -> tuple[list[int], list[int], list[Grade]]:
        """Draw the indices of a batch, with the style class and the grade of each."""
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
    options = parser.parse_args()
    recipe = Recipe.read(options.recipe).model_copy(update={"output": options.output})
    torch.set_num_threads(options.threads)
    images, stop = natural_and_filtered(recipe, VAE), Stop()
    for kind in (ShapeStage, StyleStage):
        stage = kind(recipe, images)
        if options.only in (None, stage.name) and train(stage, stop):
            write(stage, options.weights)


if __name__ == "__main__":
    run(main)
