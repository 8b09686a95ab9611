"""Recipe of `trial`, and the arms that it compares."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import field_validator, model_validator

from unziplora.config.bases import SDXL
from unziplora.config.bench import BenchConfig
from unziplora.config.recipe import Precision, Recipe, distinct, expert, key, natural_seeds
from unziplora.config.split import BUNDLED, SplitConfig

ArmName = Literal[
    "base", "default", "default-x3", "default-x10", "additions", "convolutions", "paper", "blora", "dreambooth"
]

ADDITIONS = ("phrase_steps", "content_alone", "content_variants", "style_alone", "style_variants")
"""Keys of the preset `bundled` that change the method. Its rates, rank, steps, batch, blocks, separations and words
were chosen for the size and the world of the small base."""

CONVOLUTIONS = ("targets", "column_separation", "block_separation")
"""Keys of the preset `bundled` that adapt convolutions, which have no columns to separate."""

FASTER = {"default-x3": 3, "default-x10": 10}
"""Arms that multiply the learning rates of the preset `default`."""


def split_settings(arm: str) -> dict[str, Any]:
    """Return the settings of an arm that trains by the preset `default` with changes."""
    names = ("content_learning_rate", "style_learning_rate") if arm in FASTER else ()
    rates = {name: FASTER[arm] * SplitConfig.model_fields[name].default for name in names}
    added = {"additions": ADDITIONS, "convolutions": CONVOLUTIONS}.get(arm, ())
    return {"preset": "default", **rates, **{name: BUNDLED[name] for name in added}}


class TrialConfig(Recipe):
    """Compare methods and settings on your images, with SDXL on your GPU."""

    pictures: Path = key(..., "Folder of images and words.toml, which contains their words.", "Input")
    out: Path = key(Path("trial"), "Folder for runs, scores and report; the same command continues it.", "Input")
    base: str = key(SDXL, "Base model: a diffusers folder, a hub id or a .safetensors file.", "Input")
    share_images: bool = key(
        False, "Put contact sheets and words into report.zip too; otherwise it contains figures only.", "Output"
    )

    arms: list[ArmName] = key(
        list(get_args(ArmName)),
        "base: no LoRA; default: the preset; default-x3, default-x10: with 3 and 10 times its learning rates; "
        "additions: with the preset bundled's phrase_steps and steps alone; convolutions: with these as targets too, "
        "without columns and blocks; paper: the preset; blora; dreambooth: two LoRAs.",
        "Method",
        min_length=1,
    )
    clip: str | None = key(None, "CLIP model: folder or hub id; with --dino.", "Method", min_length=1)
    dino: str | None = key(None, "DINO model: folder or hub id; with --clip.", "Method", min_length=1)
    csd: str | None = key(None, "CSD model: folder or hub id.", "Method", min_length=1)
    seeds: list[int] = key([0, 1, 2], "Training seeds.", "Training", min_length=1)
    precision: Precision = key("auto", "Number format of the base.", "Training")

    guidance: float = key(5.0, "Classifier-free guidance of the images that are scored.", "Sampling", ge=1)
    samples: int = expert(2, "Images per prompt.", "Sampling", ge=1)
    sample_steps: int = expert(30, "Denoising steps.", "Sampling", ge=1, le=1000)

    _natural = field_validator("seeds")(natural_seeds)
    _once = field_validator("arms")(distinct)

    @model_validator(mode="after")
    def _measured(self) -> TrialConfig:
        if bool(self.clip) != bool(self.dino):
            raise ValueError("--clip measures the style and --dino the content: give both, or neither")
        if not (self.clip or self.csd):
            raise ValueError("images are measured by models: give --clip and --dino, or --csd, or all three")
        return self

    def benchmark(self) -> BenchConfig:
        """Return the same as a recipe of `bench`, whose folder, cases and scores a trial uses."""
        return BenchConfig(**self.model_dump(exclude={"arms", "share_images"}))
