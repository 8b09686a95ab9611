"""Recipe of `zip`: a content LoRA and a style LoRA become one."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import field_validator, model_validator

from unziplora.config.recipe import expert, key
from unziplora.config.training import TrainingConfig, style_words
from unziplora.errors import UserError


class ZipConfig(TrainingConfig):
    """Merge a content LoRA and a style LoRA into one, by trained column scales (ZipLoRA) or without training."""

    content_lora: Path = expert(..., "Run folder or LoRA file for the content.", "Input", private=True)
    style_lora: Path = expert(..., "Run folder or LoRA file for the style.", "Input", private=True)
    content_images: list[Path] = expert(
        [],
        "Images that the content LoRA learned; default: its run's; none: the LoRA generates some.",
        "Input",
        private=True,
    )
    style_images: list[Path] = expert(
        [],
        "Images that the style LoRA learned; default: its run's; none: the LoRA generates some.",
        "Input",
        private=True,
    )

    content_prompt: str | None = key(None, "Prompt that the content LoRA learned; default: its run's.", "Prompts")
    style_prompt: str | None = key(None, "Prompt that the style LoRA learned; default: its run's.", "Prompts")
    full_prompt: str | None = expert(
        None, "Prompt of both together, for samples and the card; default: joined from the two.", "Prompts"
    )

    method: Literal["zip", "null-space", "direct"] = key(
        "zip", "zip: trained column scales; null-space: untrained; direct: a plain sum.", "Method"
    )
    projection: float = key(0.5, "Dial of null-space; 0: plain sum.", "Method", ge=0, le=1)
    content_strength: float = key(1.0, "Strength of the content LoRA.", "Method")
    style_strength: float = key(1.0, "Strength of the style LoRA.", "Method")
    orthogonality: float = expert(0.01, "Weight of the mean |m_c · m_s| of the column scales.", "Method", ge=0)
    teacher_images: int = expert(4, "Number of images that a LoRA generates if it has none.", "Method", ge=1)

    steps: int = key(100, "Optimizer steps.", "Training", ge=1)
    # Adam moves a scale by about this much per step: at 5e-5, ziplora-pytorch's rate, by 0.005 in 100 steps.
    learning_rate: float = key(1e-2, "Learning rate of the column scales.", "Training", ge=0)

    parts: bool = expert(False, "Write the two scaled LoRAs too; their sum is the merged one.", "Output")

    @field_validator("content_prompt", "style_prompt", "full_prompt")
    @classmethod
    def _not_blank(cls, text: str | None) -> str | None:
        if text is not None and not text.strip():
            raise ValueError("must not be blank")
        return text

    @model_validator(mode="after")
    def _consistent(self) -> ZipConfig:
        if self.optimizer == "prodigy":
            raise ValueError("Prodigy does not suit column scales: set optimizer to adamw")
        return self

    @property
    def loras(self) -> dict[str, Path]:
        """Return the two runs or files by name."""
        return {"content": self.content_lora, "style": self.style_lora}

    @property
    def strengths(self) -> dict[str, float]:
        """Return the strengths of the two LoRAs by name."""
        return {"content": self.content_strength, "style": self.style_strength}

    def filled_prompts(self) -> dict[str, str]:
        """Return the filled prompts by the names full, content and style.

        Raises:
            UserError: a prompt is neither set nor known from a run.
        """
        templates = {"content": self.content_prompt, "style": self.style_prompt}
        missing = [name for name, text in templates.items() if text is None]
        if missing:
            files = " and ".join(str(self.loras[name]) for name in missing)
            flags = " and ".join(f"--{name}-prompt" for name in missing)
            raise UserError(f"{files}: training prompt unknown; give the prompt that the LoRA learned as {flags}")
        content, style = (self.fill(text or "") for text in templates.values())
        full = self.fill(self.full_prompt) if self.full_prompt else joined_prompt(content, style)
        return {"full": full, "content": content, "style": style}


def joined_prompt(content: str, style: str) -> str:
    """Join two prompts: "a sks cat" and "an image in ink style" give "a sks cat in ink style"; else with a comma."""
    words = style_words(style)
    return f"{content} {words}" if words.startswith("in ") else f"{content}, {words}"
