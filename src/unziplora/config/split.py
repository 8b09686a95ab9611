"""Recipe of `split`, and its presets."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import model_validator

from unziplora.config.bases import is_bundled
from unziplora.config.recipe import expert, key
from unziplora.config.training import SMALL, ImageConfig, Target

# The published recipe (paper, section 4, and the official code), with those faults of the code that
# change the method (docs/method.md).
PAPER: dict[str, Any] = {
    "style_prompt": "a {content} in {style} style",
    "blocks": "sdxl",
    "column_separation": True,
    "block_separation": True,
    "phrase_steps": 0,
    "targets": ["attention"],
    "content_alone": 0.0,
    "content_variants": False,
    "style_alone": 0.0,
    "style_variants": False,
    "column_warmup": 1,
    "score_timesteps": 1,
    "official_code": True,
    "optimizer": "adamw8bit",
    "schedule": "constant",
    "timestep_shift": 1.0,
    "precision": "fp16",
}

# Chosen by trials on drawings and filters that the bundled base has not seen (experiments/README.md).
BUNDLED: dict[str, Any] = {
    **SMALL,
    "steps": 240,
    "content_learning_rate": 1.5e-3,
    "style_learning_rate": 2e-3,
    "schedule": "cosine",
    "column_separation": False,
    "block_separation": False,
    "blocks": "bundled",
    "column_warmup": 5,
    "score_timesteps": 4,
    "phrase_steps": 160,
    "phrase_words": [  # of the styles of its world (recipes/base/captions.py)
        *("watercolor", "oil painting", "pencil sketch", "neon sign", "pixel art", "mosaic", "3d render", "crayon"),
        *("chalk drawing", "blueprint", "halftone", "pop", "flat icon", "ink line", "gradient cartoon"),
        *("black silhouette", "engraved", "cross stitch embroidery", "dots"),
    ],
    "targets": ["attention", "convolutions"],  # the base has no attention where details are: at the latents' full size
    "content_alone": 0.5,
    "content_variants": True,
    "style_alone": 0.3,
    "style_variants": True,
}

PRESETS: dict[str, dict[str, Any]] = {"default": {}, "paper": PAPER, "bundled": BUNDLED}


class SplitConfig(ImageConfig):
    """Split one image (or a few of one subject in one style) into a content and a style LoRA."""

    presets: ClassVar[dict[str, dict[str, Any]]] = PRESETS

    content: str = key(..., 'Word for the subject, such as "cat".', "Input", min_length=1)
    style: str = key(..., 'Phrase for the style, such as "pencil sketch".', "Input", min_length=1)
    preset: Literal["auto", "default", "paper", "bundled"] = key(
        "auto",
        "Settings that yours override; paper: as published; auto: bundled on the bundled base, else default.",
        "Input",
    )
    full_prompt: str = expert("a {token} {content} in {style} style", "Prompt of the whole image.", "Prompts")
    content_prompt: str = expert("a {token} {content}", "Prompt that the content LoRA sees.", "Prompts")
    style_prompt: str = expert("an image in {style} style", "Prompt that the style LoRA sees.", "Prompts")

    content_learning_rate: float = key(5e-5, "Learning rate of the content LoRA.", "Training", ge=0)
    style_learning_rate: float = key(5e-5, "Learning rate of the style LoRA.", "Training", ge=0)
    scale_learning_rate: float = expert(5e-3, "Learning rate of the column scales.", "Training", ge=0)

    # method (UnZipLoRA, arXiv 2412.04465)
    targets: list[Target] = expert(["attention"], "Layers of the UNet to adapt.", "Method", min_length=1)
    prompt_separation: bool = expert(True, "Give each LoRA its own prompt in cross-attention K and V.", "Method")
    column_separation: bool = expert(True, "Train only the most important output columns of each LoRA.", "Method")
    block_separation: bool = expert(True, "Train one LoRA fully in blocks known for content or style.", "Method")
    blocks: str = expert(
        "sdxl",
        "Block map: 'sdxl' (as published), 'bundled' (for that base), 'blora' (one block each) or a TOML file.",
        "Method",
        private=True,
    )
    column_periods: int = expert(3, "Number of column choices, spread evenly over the run.", "Method", ge=1)
    column_share: float = expert(0.3, "Share of columns that a LoRA keeps after the last choice.", "Method", gt=0, le=1)
    column_warmup: int = expert(10, "Steps with all columns open before each choice.", "Method", ge=1)
    score_timesteps: int = expert(8, "Noisy latents over which column scores are accumulated.", "Method", ge=1)
    orthogonality: float = expert(
        0.5,
        "Weight of the orthogonality loss, the mean |m_c · m_s| of the column scales; higher: fewer shared columns.",
        "Method",
        ge=0,
    )
    official_code: bool = expert(
        False,
        "Reproduce faults of the official code: column scores by threshold on scaled gradients, strict choice, random "
        "start, decay of masked columns.",
        "Method",
    )
    phrase_steps: int = expert(
        0,
        "Steps that first learn the style phrase itself (textual inversion); the style LoRA then has a part for the "
        "text encoders. 0: none.",
        "Method",
        ge=0,
    )
    phrase_learning_rate: float = expert(
        2e-3, "Learning rate of the phrase's embeddings, without phrase_words.", "Method", gt=0
    )
    phrase_words: list[str] = expert(
        [], "Words of styles that the base knows well; the phrase is learned as a mixture of them.", "Method"
    )
    phrase_word_rate: float = expert(
        1e-2, "Learning rate of the shares of phrase_words in the mixture.", "Method", gt=0
    )
    content_alone: float = expert(
        0.0, "Share of steps in which the content LoRA learns the image without the style LoRA.", "Method", ge=0, lt=1
    )
    content_variants: bool = expert(
        False,
        "In the steps of content_alone, train on filtered variants of the image too, each with its own learned phrase; "
        "needs phrase_steps.",
        "Method",
    )
    style_alone: float = expert(
        0.0,
        "Share of steps in which the style LoRA learns the image without the content LoRA, with the style prompt only.",
        "Method",
        ge=0,
        lt=1,
    )
    style_variants: bool = expert(
        False, "In the steps of style_alone, train on the image turned and mirrored too.", "Method"
    )
    content_prior: float = expert(0.0, "Weight of prior preservation for the content LoRA.", "Method", ge=0)
    style_prior: float = expert(0.0, "Weight of prior preservation for the style LoRA.", "Method", ge=0)
    prior_images: int = expert(16, "Number of class images per prior; the base generates them.", "Method", ge=1)
    content_class_prompt: str = expert("a {content}", "Class prompt of the content prior.", "Method")
    style_class_prompt: str = expert("an image", "Class prompt of the style prior.", "Method")

    seeds: int = key(1, "Seeds to train; the best run is kept.", "Training", ge=1, le=100)
    dino: str | None = expert(
        None,
        "With clip: DINO model that compares subjects, to check after the training whether content and style came "
        "apart; folder or hub id. The bundled base is checked without.",
        "Output",
        min_length=1,
        private=True,
        may_change=True,
    )
    clip: str | None = expert(
        None,
        "With dino: CLIP model that compares styles; folder or hub id.",
        "Output",
        min_length=1,
        private=True,
        may_change=True,
    )

    @model_validator(mode="after")
    def _consistent(self) -> SplitConfig:
        if self.content.lower() == self.style.lower():
            raise ValueError(f"content and style are the same word ({self.content!r}): name the subject and its style")
        if self.content_alone + self.style_alone >= 1:
            raise ValueError(
                f"content_alone {self.content_alone:g} and style_alone {self.style_alone:g} leave no step in which the "
                "LoRAs train together; choose a sum below 1"
            )
        if self.content_variants and not (self.phrase_steps and self.content_alone):
            raise ValueError(
                "content_variants needs steps in which the content LoRA trains alone, and learned phrases; "
                "set content_alone and phrase_steps above 0, or switch content_variants off"
            )
        if self.style_variants and not self.style_alone:
            raise ValueError(
                "style_variants needs steps in which the style LoRA trains alone; set style_alone above 0, or switch "
                "style_variants off"
            )
        if self.column_separation and self.steps // self.column_periods <= self.column_warmup:
            raise ValueError(
                f"{self.steps} steps leave no room for {self.column_periods} column warm-ups of "
                f"{self.column_warmup}: raise steps, lower column_warmup or column_periods, "
                "or switch column_separation off"
            )
        if self.column_separation and "convolutions" in self.targets:
            raise ValueError(
                "column separation chooses columns of linear layers, and convolutions have none: take 'convolutions' "
                "out of targets, or switch column_separation off"
            )
        if (self.dino is None) != (self.clip is None):
            raise ValueError("the check takes two models, dino for the subject, clip for the style: set both or none")
        if self.seeds > 1 and not self.is_checked():
            raise ValueError(
                f"a check of the samples finds the best of {self.seeds} seeds: set dino and clip to two vision models "
                "(the bundled base needs neither), and keep at least one of sample_seeds"
            )
        self.check_rates(content_learning_rate=self.content_learning_rate, style_learning_rate=self.style_learning_rate)
        return self

    @property
    def separates_prompts(self) -> bool:
        """True if each LoRA reads a prompt of its own, in attention: no other layer reads prompts."""
        return self.prompt_separation and "attention" in self.targets

    def is_checked(self) -> bool:
        """Return True if the finished LoRAs are checked on their samples."""
        return bool(self.sample_seeds) and (self.dino is not None or is_bundled(self.base))

    def filled_prompts(self) -> dict[str, str]:
        """Return the three prompts."""
        return self.prompts()

    def spread_over_steps(self) -> list[str]:
        """Return the settings whose effect on a step depends on the number of all steps."""
        return [*super().spread_over_steps(), *(["column_separation"] if self.column_separation else [])]

    def prior_weights(self) -> dict[str, float]:
        """Return the weight of prior preservation by LoRA."""
        return {"content": self.content_prior, "style": self.style_prior}

    def prompts(self) -> dict[str, str]:
        """Return the filled prompts by the names full, content and style."""
        templates = {"full": self.full_prompt, "content": self.content_prompt, "style": self.style_prompt}
        return {name: self.fill(text) for name, text in templates.items()}
