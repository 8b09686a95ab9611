"""The recipe of `split`, and its presets."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import model_validator

from unziplora.config.recipe import key
from unziplora.config.training import SMALL, ImageConfig

# The published recipe (paper, section 4, and the official code), with those faults of the code that
# change the method (docs/method.md).
PAPER: dict[str, Any] = {
    "style_prompt": "a {content} in {style} style",
    "blocks": "sdxl",
    "column_separation": True,
    "block_separation": True,
    "phrase_steps": 0,
    "content_alone": 0.0,
    "content_variants": False,
    "style_alone": 0.0,
    "column_warmup": 1,
    "score_timesteps": 1,
    "official_code": True,
    "optimizer": "adamw8bit",
    "schedule": "constant",
    "timestep_shift": 1.0,
    "precision": "fp16",
}

# Found by trials on drawings and filters that the small base has not seen (experiments/README.md).
BUNDLED: dict[str, Any] = {
    **SMALL,
    "steps": 240,
    "content_learning_rate": 2e-3,
    "style_learning_rate": 1e-3,
    "schedule": "cosine",
    "column_separation": False,
    "block_separation": False,
    "blocks": "bundled",
    "column_warmup": 5,
    "score_timesteps": 4,
    "phrase_steps": 160,
    "phrase_learning_rate": 2e-3,
    "phrase_words": [  # of the styles of its world (recipes/base/captions.py)
        *("watercolor", "oil painting", "pencil sketch", "neon sign", "pixel art", "mosaic", "3d render", "crayon"),
        *("chalk drawing", "blueprint", "halftone", "pop", "flat icon", "ink line", "gradient cartoon"),
        *("black silhouette", "engraved", "cross stitch embroidery", "dots"),
    ],
    "content_alone": 0.6,
    "content_variants": True,
    "style_alone": 0.15,
}

PRESETS: dict[str, dict[str, Any]] = {"default": {}, "paper": PAPER, "bundled": BUNDLED}


class SplitConfig(ImageConfig):
    """Split one picture (or a few of one subject in one style) into a content and a style LoRA."""

    presets: ClassVar[dict[str, dict[str, Any]]] = PRESETS

    content: str = key(..., 'Word for the subject, such as "cat".', "Input", min_length=1)
    style: str = key(..., 'Phrase for the style, such as "pencil sketch".', "Input", min_length=1)
    preset: Literal["auto", "default", "paper", "bundled"] = key(
        "auto",
        "Named settings below your own. default: for SDXL; paper: as published; bundled: for the small base; auto: "
        "bundled on that base, else default.",
        "Input",
    )
    full_prompt: str = key("a {token} {content} in {style} style", "Prompt of the whole picture.", "Prompts")
    content_prompt: str = key("a {token} {content}", "Prompt that the content LoRA sees.", "Prompts")
    style_prompt: str = key("an image in {style} style", "Prompt that the style LoRA sees.", "Prompts")

    content_learning_rate: float = key(5e-5, "Learning rate of the content LoRA.", "Training", ge=0)
    style_learning_rate: float = key(5e-5, "Learning rate of the style LoRA.", "Training", ge=0)
    scale_learning_rate: float = key(5e-3, "Learning rate of the column scales.", "Training", ge=0)

    # method (UnZipLoRA, arXiv 2412.04465)
    prompt_separation: bool = key(True, "Each LoRA sees its own prompt in cross-attention K and V.", "Method")
    column_separation: bool = key(True, "Each LoRA trains only its most important output columns.", "Method")
    block_separation: bool = key(True, "Blocks known for content or style train one LoRA fully.", "Method")
    blocks: str = key(
        "sdxl",
        "Block map: 'sdxl' (as published), 'bundled' (for that base), 'blora' (one block each) or a TOML file.",
        "Method",
        private=True,
    )
    column_periods: int = key(3, "Times that columns are chosen, evenly over the run.", "Method", ge=1)
    column_share: float = key(0.3, "Share of columns that a LoRA holds after the last choice.", "Method", gt=0, le=1)
    column_warmup: int = key(10, "Steps with all columns open before each choice.", "Method", ge=1)
    score_timesteps: int = key(8, "Noisy latents over which column scores are accumulated.", "Method", ge=1)
    orthogonality: float = key(
        0.5,
        "Weight of the mean |m_c · m_s| of the column scales; higher, the LoRAs share fewer columns.",
        "Method",
        ge=0,
    )
    official_code: bool = key(
        False,
        "Reproduce faults of the official code: column scores by threshold on scaled gradients, strict choice, random "
        "start, decay of masked columns.",
        "Method",
    )
    phrase_steps: int = key(
        0,
        "Steps before all others in which the style phrase itself is learned (textual inversion); the style LoRA then "
        "has a part for the text encoders. 0: none.",
        "Method",
        ge=0,
    )
    phrase_learning_rate: float = key(5e-3, "Learning rate of the phrase's embeddings.", "Method", gt=0)
    phrase_words: list[str] = key(
        [], "Words of styles that the base knows well: the phrase is learned as a mixture of them as well.", "Method"
    )
    phrase_word_rate: float = key(1e-2, "Learning rate of the shares of these words.", "Method", gt=0)
    content_alone: float = key(
        0.0, "Share of the steps in which the content LoRA learns the picture without the other.", "Method", ge=0, lt=1
    )
    content_variants: bool = key(
        False,
        "In the steps of content_alone show the picture under plain filters too, each with words of its own; needs "
        "phrase_steps.",
        "Method",
    )
    style_alone: float = key(
        0.0,
        "Share of the steps in which the style LoRA learns the picture without the other, with the style prompt alone.",
        "Method",
        ge=0,
        lt=1,
    )
    content_prior: float = key(0.0, "Weight of prior preservation for the content LoRA.", "Method", ge=0)
    style_prior: float = key(0.0, "Weight of prior preservation for the style LoRA.", "Method", ge=0)
    prior_images: int = key(16, "Number of class pictures per prior; the base makes them.", "Method", ge=1)
    content_class_prompt: str = key("a {content}", "Class prompt of the content prior.", "Method")
    style_class_prompt: str = key("an image", "Class prompt of the style prior.", "Method")

    @model_validator(mode="after")
    def _consistent(self) -> SplitConfig:
        if self.content.lower() == self.style.lower():
            raise ValueError(f"content and style are the same word ({self.content!r}): name the subject and its style")
        if self.content_alone + self.style_alone >= 1:
            raise ValueError(
                f"content_alone {self.content_alone:g} and style_alone {self.style_alone:g} leave no step in which the "
                "LoRAs learn together: their sum must be below 1"
            )
        if self.content_variants and not (self.phrase_steps and self.content_alone):
            raise ValueError(
                "content_variants are shown while the content LoRA learns alone, and need words for their styles: "
                "give content_alone and phrase_steps above 0 too"
            )
        if self.column_separation and self.steps // self.column_periods <= self.column_warmup:
            raise ValueError(
                f"{self.steps} steps leave no room for {self.column_periods} column warm-ups of "
                f"{self.column_warmup}: raise steps, lower column_warmup or column_periods, "
                "or switch column_separation off"
            )
        self.check_rates(content_learning_rate=self.content_learning_rate, style_learning_rate=self.style_learning_rate)
        return self

    def filled_prompts(self) -> dict[str, str]:
        """The three prompts."""
        return self.prompts()

    def prior_weights(self) -> dict[str, float]:
        """The weight of prior preservation by LoRA."""
        return {"content": self.content_prior, "style": self.style_prior}

    def prompts(self) -> dict[str, str]:
        """The three prompts with the words filled in, by the names full, content and style."""
        templates = {"full": self.full_prompt, "content": self.content_prompt, "style": self.style_prompt}
        return {name: self.fill(text) for name, text in templates.items()}
