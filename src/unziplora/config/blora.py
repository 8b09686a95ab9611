"""Recipe of `train blora`, and its presets."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import model_validator

from unziplora.config.recipe import expert, key
from unziplora.config.training import SMALL, ImageConfig


class BLoraConfig(ImageConfig):
    """Train a LoRA in two blocks of the UNet: one becomes the content LoRA, one the style LoRA (arXiv 2403.14572)."""

    presets: ClassVar[dict[str, dict[str, Any]]] = {"default": {}, "bundled": {**SMALL, "learning_rate": 1e-3}}

    content: str | None = key(None, "Word for the subject; only names the run, is not trained.", "Input")
    style: str | None = key(None, "Phrase for the style; only names the run, is not trained.", "Input")
    preset: Literal["auto", "default", "bundled"] = key(
        "auto", "Settings that yours override; auto: bundled on the bundled base, else default.", "Input"
    )
    full_prompt: str = expert("A {token}", "Training prompt.", "Prompts")
    content_prompt: str = expert("A {token}", "Prompt that invokes the content.", "Prompts")
    style_prompt: str = expert("an image in {token} style", "Prompt that invokes the style.", "Prompts")
    blocks: str = expert(
        "blora",
        "Block map: 'blora' (one block each, as published), 'sdxl' (UnZipLoRA's), 'bundled' (for that base) or a TOML "
        "file.",
        "Method",
        private=True,
    )
    steps: int = key(1000, "Optimizer steps.", "Training", ge=1)
    learning_rate: float = key(5e-5, "Learning rate.", "Training", ge=0)

    @model_validator(mode="after")
    def _consistent(self) -> BLoraConfig:
        self.check_rates(learning_rate=self.learning_rate)
        return self
