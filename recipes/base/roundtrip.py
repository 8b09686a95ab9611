"""How well an exported base's autoencoder shows pictures: ``python -m recipes.base.roundtrip TOML FOLDER``.

What it cannot show, no LoRA can learn: look at the sheet before anything else.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny

from recipes.base.config import Recipe
from recipes.base.dataset import training_pictures
from recipes.base.sheets import sheet, to_pixels
from recipes.base.vae import pictures_to_rebuild, psnr, to_tensor
from unziplora.bench.cases import load_cases


@torch.no_grad()
def roundtrip(recipe: Recipe, folder: Path, drawn: Path) -> dict[str, float]:
    """Mean PSNR in dB of pictures that went through the autoencoder of a pipeline folder, by kind.

    Kinds: seen and never-trained pictures of the recipe's world, the development cases of the benchmark. Writes a
    sheet of the latter, real above, made below.
    """
    vae = AutoencoderTiny.from_pretrained(folder, subfolder="vae", torch_dtype=torch.float32).eval()
    kinds = pictures_to_rebuild(recipe, training_pictures(recipe).pixels)
    size = (recipe.world.resolution,) * 2
    cases = [np.asarray(case.image.resize(size)) for case in load_cases("dev").values()]
    found = {}
    for name, pixels in {**kinds, "dev_cases": np.stack(cases)}.items():
        real = to_tensor(pixels, torch.device("cpu"))
        made = vae(real).sample
        found[name] = round(psnr(real, made), 2)
    sheet([to_pixels(real), to_pixels(made)], drawn)
    return found


def main() -> None:
    """Print the figures; the sheet goes to the recipe's output folder."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("recipe", type=Path, help="TOML file")
    parser.add_argument("folder", type=Path, help="pipeline folder, or one that holds the autoencoder in `vae`")
    options = parser.parse_args()
    recipe = Recipe.read(options.recipe)
    for name, value in roundtrip(recipe, options.folder, recipe.output / "roundtrip.png").items():
        print(f"{name}: {value:.2f} dB")


if __name__ == "__main__":
    main()
