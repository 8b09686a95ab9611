"""What a run is made of: one pydantic model serves TOML file, CLI flags, Python API and docs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal, TypeVar

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from unziplora.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

R = TypeVar("R", bound="Recipe")

SDXL = "stabilityai/stable-diffusion-xl-base-1.0"


def key(default: Any, help: str, group: str, **constraints: Any) -> Any:
    """Declare one configuration key with its help text, its group in `--help` and its bounds."""
    return Field(default, description=help, json_schema_extra={"group": group}, **constraints)


class Recipe(BaseModel):
    """Common ground of all recipes: unknown keys are errors, values are checked and never changed later."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    @classmethod
    def make(cls: type[R], **keys: Any) -> R:
        """The recipe from keys, under the preset that they name.

        Raises:
            UserError: a key is unknown, missing, of a wrong type or out of bounds; all faults are listed.
        """
        return resolve(cls, keys)


class SplitConfig(Recipe):
    """Split one picture (or a few of one subject in one style) into a content and a style LoRA."""

    # what to split
    images: list[Path] = key(..., "Picture file, or several of one subject in one style.", "Input", min_length=1)
    content: str = key(..., 'Word for the subject, such as "cat".', "Input", min_length=1)
    style: str = key(..., 'Phrase for the style, such as "pencil sketch".', "Input", min_length=1)
    out: Path = key(..., "Run folder to create.", "Input")
    base: str = key(SDXL, "Base model: 'bundled', a diffusers folder, a hub id or a .safetensors file.", "Input")
    preset: Literal["auto", "default", "paper", "bundled"] = key(
        "auto", "Named settings below your own; auto is 'bundled' for that base, else 'default'.", "Input"
    )
    masks: list[Path] = key([], "Subject masks, one per picture: white counts in the loss.", "Input")
    background_weight: float = key(0.0, "Weight of the loss where the mask is black.", "Input", ge=0, le=1)
    resolution: int | None = key(
        None, "Side of the training picture in pixels; default: the base's own.", "Input", ge=16
    )

    # prompts
    token: str = key("sks", "Rare word that stands for this very subject.", "Prompts", min_length=1)
    full_prompt: str = key("a {token} {content} in {style} style", "Prompt of the whole picture.", "Prompts")
    content_prompt: str = key("a {token} {content}", "Prompt that the content LoRA sees.", "Prompts")
    style_prompt: str = key("an image in {style} style", "Prompt that the style LoRA sees.", "Prompts")

    # method (UnZipLoRA, arXiv 2412.04465)
    prompt_separation: bool = key(True, "Each LoRA sees its own prompt in cross-attention K and V.", "Method")
    column_separation: bool = key(True, "Each LoRA trains only its most important output columns.", "Method")
    block_separation: bool = key(True, "Blocks known for content or style train one LoRA fully.", "Method")
    blocks: str = key("sdxl", "Block map: 'sdxl' or a TOML file.", "Method")
    column_periods: int = key(3, "Times that columns are chosen, evenly over the run.", "Method", ge=1)
    column_share: float = key(0.3, "Share of columns that a LoRA holds after the last choice.", "Method", gt=0, le=1)
    column_warmup: int = key(10, "Steps with all columns open before each choice.", "Method", ge=1)
    score_timesteps: int = key(8, "Noisy latents over which column scores are accumulated.", "Method", ge=1)
    column_score: Literal["importance", "threshold"] = key(
        "importance", "Mean |ΔW ⊙ dL/dΔW| of a column, or Cone's share of entries above 1e-5.", "Method"
    )
    column_choice: Literal["exact", "strict"] = key(
        "exact", "Exactly k columns, or those strictly above the k-th score (none, if tied).", "Method"
    )
    score_scaled: bool = key(False, "Score on loss-scaled gradients in fp16, as the official code does.", "Method")
    scale_gradient: Literal["overlap", "all"] = key(
        "overlap", "Columns whose soft scales train: those held by both LoRAs, or all.", "Method"
    )
    orthogonality: float = key(0.5, "Weight of Σ|m_c · m_s|.", "Method", ge=0)
    init: Literal["zeros", "gaussian"] = key(
        "zeros", "Start of B: zeros (ΔW = 0), or random with std 1/rank like the official code.", "Method"
    )
    decay_masked: bool = key(False, "Let weight decay and momentum move masked columns.", "Method")
    content_prior: float = key(0.0, "Weight of prior preservation for the content LoRA.", "Method", ge=0)
    style_prior: float = key(0.0, "Weight of prior preservation for the style LoRA.", "Method", ge=0)
    prior_images: int = key(16, "Class pictures per prior, generated by the base.", "Method", ge=1)
    content_class_prompt: str = key("a {content}", "Class prompt of the content prior.", "Method")
    style_class_prompt: str = key("an image", "Class prompt of the style prior.", "Method")

    # LoRA and optimisation
    rank: int = key(64, "Rank of both LoRAs.", "Training", ge=1)
    alpha: float | None = key(None, "LoRA alpha (strength = alpha / rank); default: the rank.", "Training", gt=0)
    steps: int = key(600, "Optimiser steps.", "Training", ge=1)
    batch_size: int = key(1, "Noisy latents per step.", "Training", ge=1)
    content_learning_rate: float = key(5e-5, "Learning rate of the content LoRA.", "Training", ge=0)
    style_learning_rate: float = key(5e-5, "Learning rate of the style LoRA.", "Training", ge=0)
    scale_learning_rate: float = key(5e-3, "Learning rate of the column scales.", "Training", ge=0)
    optimizer: Literal["adamw", "adamw8bit", "prodigy"] = key("adamw", "Optimiser.", "Training")
    weight_decay: float = key(1e-4, "Decoupled weight decay of the LoRA matrices.", "Training", ge=0)
    betas: tuple[float, float] = key((0.9, 0.999), "Adam's betas.", "Training")
    schedule: Literal["constant", "cosine"] = key("constant", "Learning-rate schedule.", "Training")
    schedule_warmup: int = key(0, "Steps of linear learning-rate warm-up.", "Training", ge=0)
    max_grad_norm: float = key(1.0, "Gradients are clipped to this norm.", "Training", gt=0)
    min_snr_gamma: float | None = key(None, "Min-SNR weighting (arXiv 2303.09556), usually 5.", "Training", gt=0)
    noise_offset: float = key(0.0, "Per-channel noise offset.", "Training", ge=0)
    precision: Literal["auto", "bf16", "fp16", "fp32"] = key(
        "auto",
        "Arithmetic of the frozen base; auto: bf16 where the device has it, else fp16, fp32 on CPU.",
        "Training",
    )
    gradient_checkpointing: bool = key(False, "Trade time for memory.", "Training")
    device: str = key("auto", "Device: auto, cpu, cuda, mps.", "Training")
    seed: int = key(0, "Seed of everything random.", "Training", ge=0)

    # what comes out
    save_precision: Literal["fp16", "bf16", "fp32"] = key("fp16", "Number format in the files.", "Output")
    formats: list[Literal["kohya", "diffusers"]] = key(["kohya"], "File layouts to write.", "Output", min_length=1)
    checkpoint_every: int = key(200, "Steps between checkpoints; 0: only when interrupted.", "Output", ge=0)
    sample_every: int = key(0, "Steps between sample sheets; 0: only at the end.", "Output", ge=0)
    sample_subject: str = key("dog", "Another subject, for the style-alone sample.", "Output", min_length=1)
    sample_style: str = key(
        "watercolor painting", "Another style, for the content-alone sample.", "Output", min_length=1
    )
    sample_steps: int = key(30, "Denoising steps of samples.", "Output", ge=1)
    sample_guidance: float = key(5.0, "Classifier-free guidance of samples.", "Output", ge=1)
    sample_seeds: list[int] = key([0, 1], "Seeds of samples; empty: no samples.", "Output")
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = key([], "Experiment trackers.", "Output")

    @field_validator("content", "style", "token")
    @classmethod
    def _not_blank(cls, text: str) -> str:
        if not text.strip():
            raise ValueError("must not be blank")
        return " ".join(text.split())

    @model_validator(mode="after")
    def _consistent(self) -> SplitConfig:
        if self.content.lower() == self.style.lower():
            raise ValueError(f"content and style are the same word ({self.content!r}): name the subject and its style")
        if self.masks and len(self.masks) != len(self.images):
            raise ValueError(f"{len(self.masks)} masks for {len(self.images)} images: give one mask per image")
        if self.column_separation and self.steps // self.column_periods <= self.column_warmup:
            raise ValueError(
                f"{self.steps} steps leave no room for {self.column_periods} column warm-ups of "
                f"{self.column_warmup}: raise steps, lower column_warmup or column_periods, "
                "or switch column_separation off"
            )
        rates = (self.content_learning_rate, self.style_learning_rate)
        if self.optimizer == "prodigy" and 0 < max(rates) < 0.1:
            raise ValueError(
                f"Prodigy finds the step size itself, and its learning rates are factors (got {rates[0]:g} and "
                f"{rates[1]:g}): set content_learning_rate and style_learning_rate to 1"
            )
        return self

    def prompts(self) -> dict[str, str]:
        """The three prompts with the words filled in, by the names full, content and style."""
        templates = {"full": self.full_prompt, "content": self.content_prompt, "style": self.style_prompt}
        return {name: self.fill(text) for name, text in templates.items()}

    def fill(self, template: str) -> str:
        """Fill {token}, {content} and {style} into a prompt template."""
        try:
            text = template.format(token=self.token, content=self.content, style=self.style)
        except (KeyError, IndexError, ValueError) as error:
            raise UserError(
                f"prompt template {template!r}: use only {{token}}, {{content}}, {{style}} ({error})"
            ) from None
        return text.replace("style style", "style")


# The published recipe (paper, section 4, and the official code), with those faults of the code that
# change the method (docs/method.md); every deviation from the default is a key of its own.
PAPER: dict[str, Any] = {
    "style_prompt": "a {content} in {style} style",
    "column_warmup": 1,
    "score_timesteps": 1,
    "column_score": "threshold",
    "column_choice": "strict",
    "score_scaled": True,
    "init": "gaussian",
    "decay_masked": True,
    "optimizer": "adamw8bit",
    "precision": "fp16",
}

# For the small base that ships with the package: a minute on a laptop CPU. Found by trials on drawings and
# filters that the base has not seen (docs/experiments.md).
BUNDLED: dict[str, Any] = {
    "rank": 16,
    "steps": 300,
    "batch_size": 4,
    "content_learning_rate": 2e-3,
    "style_learning_rate": 5e-4,
    "column_warmup": 5,
    "score_timesteps": 4,
    "sample_guidance": 2.5,
    "sample_subject": "house",
    "sample_style": "neon sign",
}

PRESETS: dict[str, dict[str, Any]] = {"default": {}, "paper": PAPER, "bundled": BUNDLED}


def resolve(model: type[R], *layers: dict[str, Any]) -> R:
    """Merge layers of keys, later ones winning, under the preset they name, and check them.

    Raises:
        UserError: a key is unknown, missing, of a wrong type or out of bounds; all faults are listed.
    """
    given: dict[str, Any] = {}
    for layer in layers:
        given.update(layer)
    values = given
    if "preset" in model.model_fields:
        preset = given.get("preset", "auto")
        if preset == "auto":
            preset = "bundled" if given.get("base") == "bundled" else "default"
        values = {**PRESETS.get(preset, {}), **given}
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise UserError(describe(error, model)) from None


def describe(error: ValidationError, model: type[Recipe]) -> str:
    """One line per fault, with the nearest known key for an unknown one."""
    from difflib import get_close_matches

    lines = []
    for fault in error.errors():
        name = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "extra_forbidden":
            near = get_close_matches(name, model.model_fields, 1)
            lines.append(f"unknown key {name!r}" + (f": did you mean {near[0]!r}?" if near else ""))
        elif fault["type"] == "missing":
            field = model.model_fields.get(name)
            lines.append(f"{name} is missing" + (f": {field.description}" if field else ""))
        else:
            message = fault["msg"].removeprefix("Value error, ")
            lines.append(f"{name}: {message} (got {fault['input']!r})" if name else message)
    return "\n".join(lines)


def read_toml(path: Path) -> dict[str, Any]:
    """Read one TOML file of keys.

    Raises:
        UserError: the file is missing, unreadable or not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such configuration file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: not valid TOML ({error})") from None


def to_toml(config: Recipe) -> str:
    """The resolved configuration as TOML; keys whose value is None (chosen at run time) are left out."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))
