"""Loss of a base on images that it was never trained on: ``python -m recipes.base.heldout TOML [FOLDER]``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor

from recipes import run
from recipes.base.captions import strip_colors, wordings
from recipes.base.config import Recipe
from recipes.base.dataset import Images, render_items, unseen_drawings
from recipes.base.latents import encode_images
from recipes.base.text import TextEncoders
from recipes.base.unet import build_scheduler, trained_pipeline
from recipes.base.world import NEVER_FILTERS, World
from unziplora.models.base import load_base

TIMESTEPS = (100, 300, 500, 700, 900)
NOISE_SEED = 20_000


def held_out_images(recipe: Recipe, count: int = 64) -> dict[str, Images]:
    """Render up to `count` images per group; the choice depends on the world and its settings alone."""
    world = World(recipe.world)
    pairs = list(world.items(held_out_pairs=True))
    choice = np.random.default_rng(0).permutation(len(pairs))[:count]
    known = sorted({style.filter for style in recipe.world.styles.values() if style.filter})
    return {
        "held-out pairs": render_items(recipe.world, [pairs[i] for i in choice]),
        "never-trained drawings, known filters": unseen_drawings(world, count, filters=known),
        "never-trained drawings and filters": unseen_drawings(world, count, filters=sorted(NEVER_FILTERS)),
    }


@torch.no_grad()
def v_loss(pipe: StableDiffusionXLPipeline, pixels: np.ndarray, prompts: list[str], batch: int = 16) -> float:
    """Compute the v-prediction loss of images uint8 [N, R, R, 3], averaged over `TIMESTEPS` and with fixed noise."""
    text = TextEncoders((pipe.tokenizer, pipe.tokenizer_2), (pipe.text_encoder, pipe.text_encoder_2))
    alphas, side = build_scheduler().alphas_cumprod, float(pixels.shape[1])
    latents = encode_images(pipe.vae, pixels, torch.device("cpu"))
    noises = torch.randn(len(TIMESTEPS), *latents.shape, generator=torch.Generator().manual_seed(NOISE_SEED))
    hidden, pooled = text.encode(prompts)
    time_ids = torch.tensor([side, side, 0, 0, side, side]).repeat(len(prompts), 1)

    def error(t: int, noise: Tensor, part: slice) -> Tensor:
        a, b = alphas[t].sqrt(), (1 - alphas[t]).sqrt()
        noisy, target = a * latents[part] + b * noise[part], a * noise[part] - b * latents[part]
        added = {"text_embeds": pooled[part], "time_ids": time_ids[part]}
        predicted = pipe.unet(noisy, t, hidden[part], added_cond_kwargs=added).sample
        return (predicted - target).square().mean((1, 2, 3))

    parts = [slice(i, i + batch) for i in range(0, len(latents), batch)]
    errors = [error(t, noise, part) for t, noise in zip(TIMESTEPS, noises, strict=True) for part in parts]
    return float(torch.cat(errors).mean())


def held_out_loss(pipe: StableDiffusionXLPipeline, recipe: Recipe, count: int = 64) -> dict[str, float]:
    """Compute the loss of each group of held-out images, under the plainest prompt of each."""
    world, losses = World(recipe.world), {}
    for name, images in held_out_images(recipe, count).items():
        prompts = []
        for item in images.items:
            caption = world.caption(item.concept)
            prompts.append(wordings("full", strip_colors(caption) if item.black else caption, item.style)[0])
        losses[name] = v_loss(pipe, images.pixels, prompts)
    return losses


def main() -> None:
    """Print the losses of a base on held-out images: an exported folder, or the checkpoint of the recipe."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("folder", type=Path, nargs="?", help="pipeline folder; the recipe's checkpoint by default")
    parser.add_argument("--count", type=int, default=64, help="images a group")
    options = parser.parse_args()
    recipe = Recipe.read(options.recipe)
    torch.set_num_threads(recipe.threads)
    if options.folder:
        pipe = load_base(str(options.folder)).pipe
    else:
        pipe, _ = trained_pipeline(recipe)
    print(json.dumps(held_out_loss(pipe, recipe, options.count), indent=2))


if __name__ == "__main__":
    run(main)
