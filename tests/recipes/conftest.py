"""A toy image world and a toy recipe, made on the spot."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from toy import After, shape

from recipes.base.clip import ClipStage
from recipes.base.config import Recipe, Style, WorldSettings
from recipes.base.decoder import DecoderStage
from recipes.base.loop import train
from recipes.base.unet import UnetStage
from recipes.base.vae import VaeStage
from recipes.base.world import held_out_concepts

SETS = ("noto", "twemoji", "fluent-3d", "fxemoji", "noto-v1")
CONCEPTS = ("red-apple", "key", "star", "house", sorted(held_out_concepts())[0], "one-oclock", "smiling-face")


@pytest.fixture(scope="session", autouse=True)
def short_sampling() -> Iterator[None]:
    """Sample the images of sheets in two steps; twenty would take most of the time of the stage `unet`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("recipes.base.unet.SHEET_STEPS", 2)
        yield


@pytest.fixture(scope="session")
def world_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with emoji128.zip and meta.json of a few polygons."""
    folder = tmp_path_factory.mktemp("world")
    categories = ["Objects"] * 5 + ["Travel & Places", "Smileys & Emotion"]
    subcategories = ["tool"] * 5 + ["time", "face-smiling"]
    concepts = [
        {"slug": slug, "caption": slug.replace("-", " "), "category": a, "subcategory": b}
        for slug, a, b in zip(CONCEPTS, categories, subcategories, strict=True)
    ]
    sets = [{"key": key, "licence": "MIT", "drawings": key} for key in SETS]
    sets.append({"key": "openmoji", "licence": "CC-BY-SA-4.0", "drawings": "openmoji"})
    sets.append({"key": "shared-alike", "licence": "CC-BY-SA-4.0", "drawings": "shared-alike"})
    (folder / "meta.json").write_text(json.dumps({"concepts": concepts, "sets": sets}))
    with zipfile.ZipFile(folder / "emoji128.zip", "w") as archive:
        for s, key in enumerate(SETS):
            for c, slug in enumerate(CONCEPTS):
                data = io.BytesIO()
                Image.fromarray(shape(c, s)).save(data, "webp", lossless=True)
                archive.writestr(f"{key}/{slug}.webp", data.getvalue())
    return folder


@pytest.fixture(scope="session")
def world_settings(world_folder: Path) -> WorldSettings:
    """Four concepts × three styles at 32 pixels."""
    return WorldSettings(
        zip=world_folder / "emoji128.zip",
        meta=world_folder / "meta.json",
        resolution=32,
        concepts=["red-apple", "key", "star", "house"],
        drawings=["noto", "twemoji"],
        styles={
            "flat": Style(sets=["noto", "twemoji"], natural=True),
            "pencil": Style(filter="pencil"),
            "neon": Style(filter="neon"),
        },
        variants=1,
        held_out_pairs=0.2,
    )


def toy_recipe(world_settings: WorldSettings, output: Path) -> Recipe:
    """A recipe that trains every stage for a few steps."""
    few = {"batch": 4, "steps": 6, "warmup": 2, "log_every": 2}
    return Recipe.model_validate(
        {
            "name": "toy",
            "output": output,
            "threads": 1,
            "world": world_settings,
            "vae": few
            | {"channels": 8, "encoder_blocks": [0, 1, 1, 1], "decoder_blocks": [1, 1, 1, 0], "crop": 32}
            | {"pictures": 8},
            "decoder": few | {"crop": 32, "critic_width": 8},
            "clip": few | {"merges": 64, "widths": [16, 32], "layers": [2, 2], "heads": [2, 2], "embedding": 32},
            "unet": few | {"channels": [16, 32, 32], "heads": [1, 2, 2], "time_embedding": 8},
        }
    )


@pytest.fixture
def recipe(world_settings: WorldSettings, tmp_path: Path) -> Recipe:
    """A toy recipe with an empty output folder."""
    return toy_recipe(world_settings, tmp_path / "toy")


@pytest.fixture(scope="session")
def trained(world_settings: WorldSettings, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A toy recipe all of whose stages have run."""
    recipe = toy_recipe(world_settings, tmp_path_factory.mktemp("trained") / "toy")
    for stage in (VaeStage, DecoderStage, ClipStage, UnetStage):
        assert train(stage(recipe), After(1000))
    return recipe
