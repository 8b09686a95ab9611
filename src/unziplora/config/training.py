"""What every training shares: the base, the LoRA's size, optimization, output, and the pictures learned from."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import field_validator, model_validator

from unziplora.config.bases import SDXL
from unziplora.config.recipe import Precision, Recipe, key, natural_seeds
from unziplora.config.templates import fill

SMALL: dict[str, Any] = {
    "rank": 16,
    "steps": 300,
    "batch_size": 4,
    "generated_guidance": 2.5,
    "sample_guidance": 2.5,
    "sample_subject": "house",
    "sample_style": "neon sign",
}
"""What every training on the small base that ships with the package sets: a minute or two on a laptop CPU."""


class TrainingConfig(Recipe):
    """Common keys of all recipes that train."""

    out: Path = key(..., "Run folder to create.", "Input", private=True, may_change=True)
    base: str = key(SDXL, "Base model: 'bundled', a diffusers folder, a hub id or a .safetensors file.", "Input")
    resolution: int | None = key(
        None,
        "Side of the training picture in pixels, a multiple of 32 for SDXL; less needs less memory; default: the "
        "base's own.",
        "Input",
        ge=16,
    )
    token: str = key("sks", "Rare word that stands for this very subject.", "Prompts", min_length=1, expert=True)

    steps: int = key(600, "Optimizer steps.", "Training", ge=1)
    batch_size: int = key(1, "Noisy latents per step.", "Training", ge=1)
    optimizer: Literal["adamw", "adamw8bit", "prodigy"] = key(
        "adamw",
        "adamw8bit needs less memory, and bitsandbytes; prodigy finds the step size itself: set learning rates to 1.",
        "Training",
    )
    betas: tuple[float, float] = key((0.9, 0.999), "Adam's betas.", "Training", expert=True)
    schedule: Literal["constant", "cosine"] = key(
        "constant", "Learning-rate schedule; cosine ends at zero.", "Training", expert=True
    )
    schedule_warmup: int = key(0, "Steps of linear learning-rate warm-up.", "Training", ge=0, expert=True)
    max_grad_norm: float = key(1.0, "Gradients are clipped to this norm.", "Training", gt=0, expert=True)
    min_snr_gamma: float | None = key(
        None, "Min-SNR weighting (arXiv 2303.09556), usually 5.", "Training", gt=0, expert=True
    )
    noise_offset: float = key(
        0.0,
        "A constant added to the noise of each channel, for very dark or bright pictures; usually 0.05.",
        "Training",
        ge=0,
        expert=True,
    )
    timestep_shift: float = key(
        1.0,
        "Above 1, more steps train at high noise, where layout and background colors are decided; 1 is uniform.",
        "Training",
        gt=0,
        expert=True,
    )
    precision: Precision = key(
        "auto",
        "Arithmetic of the frozen base; auto: bf16 where the device has it, else fp16, fp32 on CPU.",
        "Training",
        expert=True,
    )
    gradient_checkpointing: bool = key(
        False,
        "Slower, with much less memory: for SDXL at 1024 px about 9 GiB instead of 17.",
        "Training",
        may_change=True,
    )
    cuda_graphs: bool = key(
        True,
        "On NVIDIA GPUs, record a step and replay it: the same result, sooner where the GPU waits for Python. Not with "
        "gradient checkpointing.",
        "Training",
        may_change=True,
        expert=True,
    )
    generated_steps: int = key(
        30,
        "Denoising steps for images that a training generates itself: class images, ZipLoRA's teachers.",
        "Training",
        ge=1,
        expert=True,
    )
    generated_guidance: float = key(
        5.0, "Classifier-free guidance for images that a training generates itself.", "Training", ge=1, expert=True
    )
    device: str = key("auto", "Device: auto, cpu, cuda, mps.", "Training", may_change=True)
    seed: int = key(0, "Seed of everything random.", "Training", ge=0)

    save_precision: Literal["fp16", "bf16", "fp32"] = key("fp16", "Number format in the files.", "Output", expert=True)
    formats: list[Literal["kohya", "diffusers"]] = key(
        ["kohya"],
        "File layouts to write; kohya's, which every program reads, is always among them.",
        "Output",
        may_change=True,
        expert=True,
    )
    checkpoint_every: int = key(
        200,
        "Steps between checkpoints; 0: only at the end and when interrupted.",
        "Output",
        ge=0,
        may_change=True,
        expert=True,
    )
    sample_every: int = key(0, "Steps between sample sheets; 0: only at the end.", "Output", ge=0, may_change=True)
    sample_steps: int = key(30, "Denoising steps of samples.", "Output", ge=1, may_change=True, expert=True)
    sample_guidance: float = key(
        5.0, "Classifier-free guidance of samples.", "Output", ge=1, may_change=True, expert=True
    )
    sample_seeds: list[int] = key(
        [0, 1], "Seeds of samples; none: no samples.", "Output", max_length=200, may_change=True, expert=True
    )
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = key(
        [], "Experiment trackers.", "Output", may_change=True, expert=True
    )

    _natural = field_validator("sample_seeds")(natural_seeds)

    @field_validator("formats")
    @classmethod
    def _with_kohya(cls, layouts: list[str]) -> list[str]:
        return list(dict.fromkeys(["kohya", *layouts]))

    @field_validator("betas")
    @classmethod
    def _below_one(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError("each is at least 0 and below 1")
        return betas

    def noising(self) -> dict[str, Any]:
        """How noisy latents are drawn and weighted: keywords of `objective.denoising_loss`."""
        return self.model_dump(include={"batch_size", "min_snr_gamma", "noise_offset", "timestep_shift"})

    def samples_at_once(self) -> int:
        """Pictures of a sample sheet computed together; with guidance each counts twice, and a step's batch fits."""
        return max(1, min(self.batch_size // 2, len(self.sample_seeds)))

    def words(self) -> dict[str, str]:
        """The user's words by the names under which prompt templates call them."""
        named = {name: getattr(self, name, None) for name in ("token", "content", "style")}
        return {name: word for name, word in named.items() if word}

    def fill(self, template: str) -> str:
        """Fill {token}, {content} and {style} into a prompt template.

        Raises:
            UserError: the template asks for something else, or for a word that is not given.
        """
        return fill(template, self.words())

    def style_trigger(self, template: str, word: str = "{style}") -> str:
        """What calls a style up behind any subject, from the template of the prompt that it was trained with."""
        prompt, end = self.fill(template), self.fill(f"in {word} style")
        return end if prompt.endswith(end) else style_words(prompt)

    def check_rates(self, **rates: float) -> None:
        """Refuse learning rates that do not go with the optimizer."""
        if self.optimizer == "prodigy" and any(0 < rate < 0.1 for rate in rates.values()):
            got = " and ".join(f"{rate:g}" for rate in rates.values())
            raise ValueError(
                f"Prodigy finds the step size itself, and its learning rates are factors (got {got}): "
                f"set {' and '.join(rates)} to 1"
            )

    def filled_prompts(self) -> dict[str, str]:
        """The prompts that templates make, by name, to be shown before a run."""
        templates = {name.removesuffix("_prompt"): text for name, text in self if name.endswith("_prompt") and text}
        return {name: self.fill(text) for name, text in templates.items()}


class ImageConfig(TrainingConfig):
    """Common keys of the recipes that learn from pictures."""

    images: list[Path] = key(
        ...,
        "Picture file, or several that share what is to be learned.",
        "Input",
        min_length=1,
        private=True,
        expert=True,
    )
    masks: list[Path] = key([], "Subject masks, one per picture: white counts in the loss.", "Input", private=True)
    background_weight: float = key(0.0, "Weight of the loss where the mask is black.", "Input", ge=0, le=1, expert=True)

    rank: int = key(
        64,
        "Rank of the LoRA (of each, where there are two); all attentions of SDXL make 2.9 MB per rank.",
        "Training",
        ge=1,
    )
    alpha: float | None = key(
        None, "LoRA alpha (strength = alpha / rank); default: the rank.", "Training", gt=0, expert=True
    )
    weight_decay: float = key(1e-4, "Decoupled weight decay of the LoRA matrices.", "Training", ge=0, expert=True)
    sample_subject: str = key(
        "dog", "Another subject, for the style-alone sample.", "Output", min_length=1, may_change=True, expert=True
    )
    sample_style: str = key(
        "watercolor painting",
        "Another style, for the content-alone sample.",
        "Output",
        min_length=1,
        may_change=True,
        expert=True,
    )

    def prior_weights(self) -> dict[str, float]:
        """The weight of prior preservation by LoRA; none, unless a recipe has it."""
        return {}

    @field_validator("content", "style", "token", check_fields=False)
    @classmethod
    def _not_blank(cls, text: str | None) -> str | None:
        if text is not None and not text.strip():
            raise ValueError("must not be blank")
        return None if text is None else " ".join(text.split())

    @model_validator(mode="after")
    def _one_mask_each(self) -> ImageConfig:
        if self.masks and len(self.masks) != len(self.images):
            raise ValueError(f"{len(self.masks)} masks for {len(self.images)} images: give one mask per image")
        return self


def style_words(style: str) -> str:
    """What calls a style up behind any subject: of "an image in ink style" the end, else the whole prompt."""
    end = re.search(r".*\b(in .+ style)$", style)
    return end[1] if end else style
