"""Train the stages of a recipe: ``python -m recipes.base.train TOML [vae] [decoder] [clip] [unet]``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from recipes import run
from recipes.base.config import Recipe
from recipes.base.loop import Stage, Stop, train
from unziplora.errors import UserError
from unziplora.models.device import flushed_denormals


def _vae(recipe: Recipe, init: Path | None) -> Stage:
    from recipes.base.vae import VaeStage

    return VaeStage(recipe, init)


def _decoder(recipe: Recipe, init: Path | None) -> Stage:
    from recipes.base.decoder import DecoderStage

    return DecoderStage(recipe)


def _clip(recipe: Recipe, init: Path | None) -> Stage:
    from recipes.base.clip import ClipStage

    return ClipStage(recipe)


def _unet(recipe: Recipe, init: Path | None) -> Stage:
    from recipes.base.unet import UnetStage

    return UnetStage(recipe, init)


STAGES: dict[str, Callable[[Recipe, Path | None], Stage]] = {
    "vae": _vae,
    "decoder": _decoder,
    "clip": _clip,
    "unet": _unet,
}


def main() -> None:
    """Run stages one after another; stopped ones continue from their checkpoint when run again."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("recipe", type=Path, help="TOML file")
    parser.add_argument("stages", nargs="*", default=list(STAGES), help=f"of {', '.join(STAGES)}; all by default")
    parser.add_argument("--minutes", type=float, help="stop cleanly after this long")
    parser.add_argument("--until", help="stop cleanly at this time of day, UTC, HH:MM")
    parser.add_argument("--init", type=Path, help="exported pipeline folder whose autoencoder or UNet to start from")
    options = parser.parse_args()
    if unknown := sorted(set(options.stages) - set(STAGES)):
        raise UserError(f"no stage {', '.join(unknown)}: there are {', '.join(STAGES)}")
    if options.init and not (options.init / "model_index.json").is_file():
        raise UserError(f"{options.init}: not a folder that `python -m recipes.base.export` wrote")
    recipe, stop = Recipe.read(options.recipe), Stop(options.minutes, options.until)
    torch.set_num_threads(recipe.threads)
    with flushed_denormals(torch.device("cpu")):
        for name in options.stages:
            if not train(STAGES[name](recipe, options.init), stop):
                return


if __name__ == "__main__":
    run(main)
