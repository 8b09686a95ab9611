"""The recipe of `train blora`, and its presets."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import model_validator

from unziplora.config.recipe import key
from unziplora.config.training import SMALL, ImageConfig


class BLoraConfig(ImageConfig):
    """Train a LoRA in two blocks of the UNet, which then are a content and a style LoRA (B-LoRA, arXiv 2403.14572)."""

    presets: ClassVar[dict[str, dict[str, Any]]] = {"default": {}, "bundled": {**SMALL, "learning_rate": 1e-3}}

    content: str | None = key(None, "Word for the subject; names the files' card, is not trained.", "Input")
    style: str | None = key(None, "Phrase for the style; names the files' card, is not trained.", "Input")
    preset: Literal["auto", "default", "bundled"] = key(
        "auto", "Named settings below your own; auto is 'bundled' for that base, else 'default'.", "Input"
    )
    full_prompt: str = key("A {token}", "Prompt of the training.", "Prompts")
    content_prompt: str = key("A {token}", "Prompt that calls the content up.", "Prompts")
    style_prompt: str = key("an image in {token} style", "Prompt that calls the style up.", "Prompts")
    blocks: str = key(
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
