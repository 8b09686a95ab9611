"""Recipe of `bench`: methods, cases, training, sampling and measures."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from pydantic import field_validator, model_validator

from unziplora.config.recipe import Precision, Recipe, distinct, expert, key, natural_seeds

MethodName = Literal[
    "base",
    "unziplora",
    "paper",
    "joint",
    "prompt",
    "column",
    "block",
    "words",
    "attention",
    "dreambooth",
    "blora",
    "ziplora",
    "null-space",
    "direct",
    "oracle",
]
ABLATION: tuple[MethodName, ...] = ("joint", "prompt", "column", "block", "words", "attention", "unziplora")
"""Joint training of two LoRAs without separation; then with one more of the paper's separations each; then the preset
on attention layers without its steps alone; then on attention layers; then the preset."""

SEARCHED: tuple[MethodName, ...] = ("unziplora", "paper", "dreambooth", "blora", "ziplora")
"""Methods with settings of their own; the others inherit them from these, or have none to choose."""


class BenchConfig(Recipe):
    """Measure methods against images that show the correct result."""

    out: Path = key(Path("bench"), "Folder for runs, scores and report; the same command continues it.", "Input")
    base: str = key("bundled", "Base model: 'bundled', a diffusers folder, a hub id or a .safetensors file.", "Input")
    split: Literal["dev", "test"] = key("dev", "dev: cases to choose settings on; test: for final figures.", "Input")
    cases: list[str] = expert([], "Cases by name; default: all of the split.", "Input")
    pictures: Path | None = key(
        None, "Folder of photos and words.toml to measure instead, by the models of clip, dino and csd.", "Input"
    )
    quick: bool = key(False, "Only the first two cases and one seed.", "Input")
    settings: Path | None = key(
        None,
        "TOML file with settings per method, as a search writes it; a search keeps the keys that it does not try.",
        "Input",
    )

    methods: list[MethodName] = key(
        [name for name in get_args(MethodName) if name != "paper"],
        "base: no LoRA; unziplora: its preset; paper: as published; joint, prompt, column, block: no separation, then "
        "one more of the paper's each; words, attention: the preset on attention, without and with its steps "
        "alone; dreambooth; ziplora, null-space, direct: its LoRAs merged; blora; oracle: trained on the truth. The "
        "scale needs base and oracle.",
        "Method",
        min_length=1,
    )
    measures: list[Literal["trained", "plain"]] = expert(
        ["trained", "plain"],
        "Measures to compare images by; the first one decides the headline.",
        "Method",
        min_length=1,
    )
    clip: str | None = expert(None, "CLIP model for --pictures: folder or hub id.", "Method", min_length=1)
    dino: str | None = expert(None, "DINO model for --pictures: folder or hub id.", "Method", min_length=1)
    csd: str | None = expert(None, "CSD model for --pictures: folder or hub id.", "Method", min_length=1)
    search: int = key(
        0, "Number of settings to try per method; writes settings.toml instead of a report.", "Method", ge=0
    )
    token: str = expert("sks", "Rare word that stands for the subject.", "Method", min_length=1)
    seeds: list[int] = key([0, 1, 2], "Training seeds.", "Training", min_length=1)
    oracle_seeds: int | None = expert(
        None, "Number of seeds for the oracle, which takes the longest to train; default: all.", "Training", ge=1
    )
    precision: Precision = expert("auto", "Number format of the base.", "Training")
    device: str = key("auto", "Device: auto, cpu, cuda, mps.", "Training")
    workers: int = key(1, "Processes that share the work; more than one need Ray.", "Training", ge=1)

    samples: int = expert(2, "Images per prompt.", "Sampling", ge=1)
    sample_steps: int = expert(20, "Denoising steps.", "Sampling", ge=1, le=1000)
    guidance: float = expert(2.5, "Classifier-free guidance; 1 switches it off.", "Sampling", ge=1)

    _natural = field_validator("seeds")(natural_seeds)
    _once = field_validator("methods", "measures")(distinct)

    @model_validator(mode="after")
    def _consistent(self) -> BenchConfig:
        if self.search and self.split == "test":
            raise ValueError("settings are searched on the cases of split dev; those of test are for the final figures")
        if self.search and not set(SEARCHED) & set(self.methods):
            raise ValueError(f"nothing to search settings for: name some of {', '.join(SEARCHED)} with --methods")
        models = bool(self.csd or (self.clip and self.dino))
        if self.pictures is not None and not models:
            raise ValueError("photos are measured by models: give --clip and --dino, or --csd, or all three")
        if self.pictures is None and (self.clip or self.dino or self.csd):
            raise ValueError("--clip, --dino and --csd measure photos: give --pictures FOLDER too")
        if self.pictures is not None and (self.search or self.cases):
            raise ValueError("--pictures goes with neither --search nor --cases: there is no truth to choose by")
        if self.pictures is not None and set(self.methods) == {"oracle"}:
            raise ValueError("the oracle learns from the truth, which photos do not have: name other --methods")
        return self

    def training_seeds(self, method: str) -> list[int]:
        """Return the seeds that a method is trained with."""
        seeds = self.seeds[:1] if self.quick else self.seeds
        return seeds[: self.oracle_seeds] if method == "oracle" else seeds
