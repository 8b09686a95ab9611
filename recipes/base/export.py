"""Write a trained base as a pipeline folder: ``python -m recipes.base.export TOML FOLDER``."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline
from transformers import CLIPTokenizer

from recipes import run
from recipes.base.captions import STYLE_WORDS
from recipes.base.config import Recipe
from recipes.base.judges import FOLDER
from recipes.base.unet import trained_pipeline
from recipes.base.world import World
from unziplora.errors import UserError

LIMIT = 60_000_000
CARD = Path(__file__).with_name("card.md")


def write_vocabulary(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write vocab.json and merges.txt, which older tools read, next to tokenizer.json."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False))
    lines = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(lines) + "\n")


def tidy_vae_config(path: Path) -> None:
    """Remove the path of the weights and an entry that diffusers writes but warns about on reading."""
    config = json.loads(path.read_text())
    for name in ("block_out_channels", "_name_or_path"):
        config.pop(name, None)
    path.write_text(json.dumps(config, indent=2) + "\n")


def attributions(world: World) -> str:
    """Return a table of the drawing sets that the weights were trained on."""
    used = {s for style in world.settings.styles.values() for s in style.sets} | set(world.settings.drawings)
    rows = [f"| {key} | {world.sets[key]['licence']} | {world.sets[key].get('package', '')} |" for key in sorted(used)]
    return "\n".join(["| set | license | source |", "|---|---|---|", *rows])


def scores_table(evaluation: dict, judges: dict) -> str:
    """Return a table of the judges' scores for samples and, for comparison, for real images."""
    lines = ["| prompts | pictures | concept right | style right |", "|---|---|---|---|"]
    for name, shares in evaluation.get("scores", {}).items():
        cells = [f"{100 * shares[axis]:.0f} %" if axis in shares else "–" for axis in ("concept", "style")]
        lines.append(f"| {name} | {shares['pictures']:.0f} | {cells[0]} | {cells[1]} |")
    if judges:
        real = [judges[axis]["accuracy"]["unseen drawings"] for axis in ("concept", "style")]
        lines.append(f"| (real pictures, unseen drawings) | – | {100 * real[0]:.0f} % | {100 * real[1]:.0f} % |")
    return "\n".join(lines)


def card(recipe: Recipe, steps: int, channels: int, evaluation: dict) -> str:
    """Return the model card: contents, styles, images seen with the steps of this recipe, scores, attributions."""
    world = World(recipe.world)
    words = [f"- {STYLE_WORDS[style][0]}" for style in recipe.world.styles]
    about = FOLDER / f"{recipe.name}.json"
    judges = json.loads(about.read_text()) if about.exists() else {}
    captions = [world.caption(concept) for concept in world.trained_concepts]
    return CARD.read_text().format(
        resolution=recipe.world.resolution,
        channels=channels,
        concepts=", ".join(captions) if len(captions) <= 100 else f"{len(captions)} things",
        styles="\n".join(words),
        pictures=f"{recipe.unet.seen(steps):,}",
        scores=scores_table(evaluation, judges),
        attributions=attributions(world),
    )


def export(recipe: Recipe, folder: Path) -> int:
    """Write the folder with half-precision weights and the card; return its size in bytes.

    Raises:
        UserError: the folder is larger than 60 MB.
    """
    pipe, steps = trained_pipeline(recipe)
    evaluation_file = recipe.output / "evaluation" / "evaluation.json"
    evaluation = json.loads(evaluation_file.read_text()) if evaluation_file.exists() else {}
    if folder.exists():
        shutil.rmtree(folder)
    pipe.to(torch.float16).save_pretrained(folder, safe_serialization=True)
    tidy_vae_config(folder / "vae" / "config.json")
    for name in ("tokenizer", "tokenizer_2"):
        write_vocabulary(getattr(pipe, name), folder / name)
    for name in ("text_encoder", "text_encoder_2"):  # by default all parts load in fp32, not only those of diffusers
        file = folder / name / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "dtype": "float32"}, indent=2) + "\n")
    (folder / "README.md").write_text(card(recipe, steps, pipe.vae.config.latent_channels, evaluation))
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    if size > LIMIT:
        raise UserError(f"{folder} has {size / 1e6:.1f} MB, more than {LIMIT / 1e6:.0f}: use a smaller UNet")
    StableDiffusionXLPipeline.from_pretrained(folder)
    return size


def main() -> None:
    """Export the averaged weights of a recipe's checkpoint."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    size = export(Recipe.read(options.recipe), options.folder)
    print(f"{options.folder}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    run(main)
