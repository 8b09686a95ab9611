"""Reconstruction quality of an exported base's autoencoder: ``python -m recipes.base.roundtrip TOML FOLDER``.

No LoRA can learn a look that the autoencoder cannot show, so look at the sheet first.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny

from recipes import run
from recipes.base.config import Recipe
from recipes.base.dataset import training_images
from recipes.base.sheets import sheet, to_pixels
from recipes.base.vae import psnr, reconstruction_images, to_tensor
from unziplora.bench.cases import load_cases


@torch.no_grad()
def roundtrip(recipe: Recipe, folder: Path, path: Path) -> dict[str, float]:
    """Return the mean PSNR in dB of reconstructions by the autoencoder of a pipeline folder, by kind of image.

    Kinds: seen and never-trained images of the recipe's world, and the benchmark's development cases. The sheet `path`
    shows the latter, real images above, reconstructions below.
    """
    vae = AutoencoderTiny.from_pretrained(folder, subfolder="vae", torch_dtype=torch.float32).eval()
    kinds = reconstruction_images(recipe, training_images(recipe).pixels)
    size = (recipe.world.resolution,) * 2
    cases = [np.asarray(case.image.resize(size)) for case in load_cases("dev").values()]
    figures = {}
    for name, pixels in {**kinds, "dev_cases": np.stack(cases)}.items():
        real = to_tensor(pixels, torch.device("cpu"))
        output = vae(real).sample
        figures[name] = round(psnr(real, output), 2)
    sheet([to_pixels(real), to_pixels(output)], path)
    return figures


def main() -> None:
    """Print the figures; the sheet goes to the recipe's output folder."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("recipe", type=Path, help="TOML file")
    parser.add_argument("folder", type=Path, help="pipeline folder, or one that contains the autoencoder in `vae`")
    options = parser.parse_args()
    recipe = Recipe.read(options.recipe)
    for name, value in roundtrip(recipe, options.folder, recipe.output / "roundtrip.png").items():
        print(f"{name}: {value:.2f} dB")


if __name__ == "__main__":
    run(main)
