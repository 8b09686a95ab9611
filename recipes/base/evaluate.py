"""Scores of a base by the judges: ``python -m recipes.base.evaluate TOML [FOLDER]``."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline

from recipes import run
from recipes.base.captions import Kind, wordings
from recipes.base.config import Recipe
from recipes.base.judges import AXES, FOLDER, Judge
from recipes.base.sheets import sheet
from recipes.base.unet import sample, trained_pipeline
from recipes.base.world import World, is_held_out_pair
from unziplora.models.base import load_base


@dataclass
class Question:
    """Prompt, with the concept and the style that an image of it must show."""

    prompt: str
    concept: str | None = None
    style: str | None = None


def questions(recipe: Recipe, judged: list[str], count: int, seed: int = 0) -> dict[str, list[Question]]:
    """Return prompts of seen and of unseen pairs, contents alone and styles alone, at most about `count` of each.

    The styles are those of the recipe that the judge knows; a recipe may have more.
    """
    world = World(recipe.world)
    styles = {name: settings for name, settings in recipe.world.styles.items() if name in judged}

    def ask(kind: Kind, concept: str | None = None, style: str | None = None) -> Question:
        caption = world.caption(concept) if concept else None
        return Question(wordings(kind, caption, style)[0], concept, style)

    pairs: dict[bool, list[Question]] = {False: [], True: []}
    for concept in world.trained_concepts:
        for style, settings in styles.items():
            unseen = is_held_out_pair(concept, style, recipe.world.held_out_pairs) and not settings.natural
            pairs[unseen].append(ask("full", concept, style))
    rng = np.random.default_rng(seed)
    seen = [pairs[False][i] for i in rng.permutation(len(pairs[False]))[:count]]
    new = [pairs[True][i] for i in rng.permutation(len(pairs[True]))[:count]]
    contents = [ask("content", concept) for concept in world.trained_concepts[:count]]
    alone = [ask("style", style=style) for style in styles for _ in range(max(1, count // 4 // len(styles)))]
    return {"seen pairs": seen, "unseen pairs": new, "content only": contents, "style only": alone}


def answer(
    pipe: StableDiffusionXLPipeline, group: list[Question], size: int, guidance: float, steps: int
) -> np.ndarray:
    """Sample one image for each question, uint8 [N, R, R, 3]."""
    parts = [group[i : i + 16] for i in range(0, len(group), 16)]
    samples = [
        sample(pipe, [q.prompt for q in part], size, guidance, seed=1000 + 16 * n, steps=steps)
        for n, part in enumerate(parts)
    ]
    return np.concatenate(samples)


def score(group: list[Question], concepts: list[str], styles: list[str]) -> dict[str, float]:
    """Compute the shares of right concepts and right styles among the questions that name one."""
    shares: dict[str, float] = {"pictures": len(group)}
    for axis, judged in (("concept", concepts), ("style", styles)):
        right = [getattr(q, axis) == j for q, j in zip(group, judged, strict=True) if getattr(q, axis)]
        if right:
            shares[axis] = round(float(np.mean(right)), 4)
    return shares


def evaluate(
    pipe: StableDiffusionXLPipeline,
    recipe: Recipe,
    *,
    judges_folder: Path = FOLDER,
    count: int = 96,
    guidance: float | None = None,
    steps: int = 20,
) -> dict[str, dict[str, float]]:
    """Score every group of questions; write sheets of the samples to the recipe's output folder."""
    judge_concept, judge_style = (Judge.load(recipe.name, axis, judges_folder) for axis in AXES)
    scores = {}
    for name, group in questions(recipe, judge_style.labels, count).items():
        pixels = answer(pipe, group, recipe.world.resolution, guidance or recipe.unet.guidance, steps)
        concepts, styles = judge_concept(pixels), judge_style(pixels)
        scores[name] = score(group, concepts, styles)
        if name == "content only":
            natural = {style for style, settings in recipe.world.styles.items() if settings.natural}
            scores[name]["natural style"] = round(float(np.mean([style in natural for style in styles])), 4)
        width = min(16, len(pixels))
        rows = [pixels[i : i + width] for i in range(0, len(pixels) - width + 1, width)]
        sheet(rows, recipe.output / "evaluation" / f"{name.replace(' ', '-')}.png")
        print(name, scores[name], flush=True)
    return scores


def main() -> None:
    """Judge an exported folder or the checkpoint of the recipe; write evaluation.json."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("folder", type=Path, nargs="?", help="pipeline folder; the recipe's checkpoint by default")
    parser.add_argument("--count", type=int, default=96, help="prompts a group")
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    recipe = Recipe.read(options.recipe)
    torch.set_num_threads(recipe.threads)
    if options.folder:
        pipe = load_base(str(options.folder)).pipe
        about: dict[str, object] = {"folder": str(options.folder)}
    else:
        pipe, trained = trained_pipeline(recipe)
        about = {"steps": trained + recipe.unet.before, "pictures seen": recipe.unet.seen(trained)}
    about["scores"] = evaluate(pipe, recipe, count=options.count, guidance=options.guidance, steps=options.steps)
    path = recipe.output / "evaluation" / "evaluation.json"
    path.write_text(json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    run(main)
