"""Classifiers of concept and of style that judge a base: ``python -m recipes.base.judges TOML``.

They learn from real images only, including the held-out pairs. They are tested on drawings and filters that neither
they nor the base have seen.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from recipes import run
from recipes.base.clip import ImageEncoder
from recipes.base.config import Recipe
from recipes.base.dataset import Images, render_items, training_images
from recipes.base.loop import Stage, Stop, train
from recipes.base.optimizers import adamw
from recipes.base.vae import to_tensor
from recipes.base.world import Item, World

Axis = Literal["concept", "style"]
AXES: tuple[Axis, Axis] = ("concept", "style")
FOLDER = Path(__file__).with_name("judges")


def judge_images(recipe: Recipe) -> Images:
    """Return the recipe's images and those of the held-out pairs."""
    mine = training_images(recipe)
    held_out = list(World(recipe.world).items(held_out_pairs=True))
    if not held_out:
        return mine
    more = render_items(recipe.world, held_out)
    return Images(np.concatenate([mine.pixels, more.pixels]), mine.items + more.items)


def judged_items(recipe: Recipe) -> dict[str, list[Item]]:
    """Return the items of each test: unseen drawings in known styles, and unseen or known ones in unseen filters."""
    world, s = World(recipe.world), recipe.judges
    styles = {name: style.filter for name, style in recipe.world.styles.items() if style.filter or style.natural}
    new = [(d, c) for d in s.test_drawings for c in world.trained_concepts if world.has(d, c)]
    known = [(d, c) for d in recipe.world.drawings for c in world.trained_concepts if world.has(d, c)]
    return {
        "unseen drawings": [Item(c, d, name, f) for name, f in styles.items() for d, c in new],
        "unseen drawings, unseen filters": [Item(c, d, f, f) for f in s.test_filters for d, c in new],
        "unseen filters": [Item(c, d, f, f) for f in s.test_filters for d, c in known],
    }


def jitter(pixels: Tensor, rng: np.random.Generator) -> Tensor:
    """Shift images by up to a twelfth and add a little noise, so that judges do not rely on exact positions."""
    reach = pixels.shape[-1] // 12
    padded = F.pad(pixels, (reach,) * 4, mode="replicate")
    y, x = rng.integers(0, 2 * reach + 1, 2)
    size = pixels.shape[-1]
    return padded[..., y : y + size, x : x + size] + 0.08 * torch.randn_like(pixels)


class JudgeStage(Stage):
    """Training of one judge by cross-entropy."""

    def __init__(self, recipe: Recipe, axis: Axis):
        self.name = f"judge-{axis}"
        super().__init__(recipe)
        self.axis, self.settings = axis, recipe.judges
        self.images = judge_images(recipe)
        self.labels = sorted({getattr(item, axis) for item in self.images.items})
        self.classes = torch.tensor([self.labels.index(getattr(i, axis)) for i in self.images.items])
        torch.manual_seed(recipe.seed)
        self.net = ImageEncoder(recipe.judges.width, len(self.labels)).to(self.device)
        self.modules = {"net": self.net}
        self.optimizer = adamw(self.modules, recipe.judges.lr, weight_decay=0.05)

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        rng = self.draw(step)
        chosen = rng.integers(0, len(self.images), self.settings.batch)
        pixels = jitter(to_tensor(self.images.pixels[chosen], self.device), rng)
        logits = self.net(pixels).float()
        truth = self.classes[torch.from_numpy(chosen)].to(self.device)
        loss = F.cross_entropy(logits, truth, label_smoothing=0.05)
        return loss, {"loss": loss.item(), "right": (logits.argmax(1) == truth).float().mean().item()}


@dataclass
class Judge:
    """Trained classifier and the names of its classes."""

    net: ImageEncoder
    labels: list[str]

    @classmethod
    def load(cls, recipe: str, axis: Axis, folder: Path = FOLDER) -> Judge:
        """Read the judge of a recipe, by the recipe's name."""
        about = json.loads((folder / f"{recipe}.json").read_text())[axis]
        net = ImageEncoder(about["width"], len(about["labels"]))
        weights = load_file(folder / f"{recipe}-{axis}.safetensors")
        net.load_state_dict({key: value.float() for key, value in weights.items()})
        return cls(net.eval(), about["labels"])

    @torch.no_grad()
    def __call__(self, pixels: np.ndarray) -> list[str]:
        """Return the most likely label of each image uint8 [N, R, R, 3]."""
        device = next(self.net.parameters()).device
        parts = [self.net(to_tensor(pixels[i : i + 256], device)) for i in range(0, len(pixels), 256)]
        return [self.labels[i] for i in torch.cat(parts).argmax(1).tolist()]


def accuracy(judge: Judge, pixels: np.ndarray, truth: list[str]) -> float:
    """Compute the share of images that the judge gets right."""
    return float(np.mean([a == b for a, b in zip(judge(pixels), truth, strict=True)]))


def measure(judge: Judge, axis: Axis, recipe: Recipe) -> dict[str, float]:
    """Compute the accuracy on real images of every test that has this judge's classes."""
    accuracies = {}
    for name, items in judged_items(recipe).items():
        if axis == "style" and "filters" in name:
            continue
        images = render_items(recipe.world, items)
        truth = [getattr(item, axis) for item in items]
        accuracies[name] = round(accuracy(judge, images.pixels, truth), 4)
    return accuracies


def train_judges(recipe: Recipe, stop: Stop) -> None:
    """Train both judges and write them, with their accuracy, into FOLDER."""
    FOLDER.mkdir(exist_ok=True)
    about = {}
    for axis in AXES:
        stage = JudgeStage(recipe, axis)
        if not train(stage, stop):
            return
        judge = Judge(stage.net.eval(), stage.labels)
        about[axis] = {"width": recipe.judges.width, "labels": stage.labels, "accuracy": measure(judge, axis, recipe)}
        weights = {key: value.half().contiguous().cpu() for key, value in stage.net.state_dict().items()}
        save_file(weights, FOLDER / f"{recipe.name}-{axis}.safetensors")
        print(axis, about[axis]["accuracy"])
    (FOLDER / f"{recipe.name}.json").write_text(json.dumps(about, indent=2) + "\n")


def main() -> None:
    """Train the judges of a recipe and write them to `recipes/base/judges`."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("recipe", type=Path)
    recipe = Recipe.read(parser.parse_args().recipe)
    torch.set_num_threads(recipe.threads)
    train_judges(recipe, Stop())


if __name__ == "__main__":
    run(main)
