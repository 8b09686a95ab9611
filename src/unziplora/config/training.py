"""Keys that all trainings share: base, LoRA size, optimization, output, and the images to learn from."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationInfo, field_validator, model_validator

from unziplora.config.bases import SDXL, is_bundled
from unziplora.config.recipe import Precision, Recipe, distinct, expert, key, natural_seeds
from unziplora.config.templates import fill, plain_words

Fit = Literal["crop", "bucket", "pad"]
Target = Literal["attention", "feed-forward", "projections", "convolutions"]

SMALL: dict[str, Any] = {
    "rank": 16,
    "steps": 300,
    "batch_size": 4,
    "generated_guidance": 2.5,
    "sample_guidance": 2.5,
    "sample_subject": "house",
    "sample_style": "neon sign",
}
"""Settings for any training on the bundled base: a minute or two on a laptop CPU."""


class TrainingConfig(Recipe):
    """Keys of all trainings."""

    out: Path = key(..., "Run folder to create.", "Input", private=True, may_change=True)
    base: str = key(SDXL, "Base model: 'bundled', a diffusers folder, a hub id or a .safetensors file.", "Input")
    resolution: int | None = key(None, "Pixels of a square's side; default: the base's own.", "Input", ge=16, le=4096)
    token: str = expert("sks", "Rare word that stands for this particular subject.", "Prompts", min_length=1)

    steps: int = key(600, "Optimizer steps.", "Training", ge=1)
    batch_size: int = expert(1, "Noisy latents per step.", "Training", ge=1)
    optimizer: Literal["adamw", "adamw8bit", "prodigy"] = key(
        "adamw", "adamw8bit saves memory; prodigy finds the rate itself.", "Training"
    )
    betas: tuple[float, float] = expert((0.9, 0.999), "Adam's betas.", "Training")
    schedule: Literal["constant", "cosine"] = expert(
        "constant", "Learning-rate schedule; cosine decays to zero.", "Training"
    )
    schedule_warmup: int = expert(0, "Steps of linear learning-rate warm-up.", "Training", ge=0)
    max_grad_norm: float = expert(1.0, "Norm to which gradients are clipped.", "Training", gt=0)
    min_snr_gamma: float | None = expert(
        None, "Gamma of min-SNR weighting (arXiv 2303.09556); usually 5.", "Training", gt=0
    )
    noise_offset: float = expert(
        0.0,
        "Offset added to the noise of each channel, for very dark or bright images; usually 0.05.",
        "Training",
        ge=0,
    )
    timestep_shift: float = expert(
        1.0,
        "Above 1, more steps train at high noise, which decides layout and background colors; 1 is uniform.",
        "Training",
        gt=0,
    )
    precision: Precision = expert(
        "auto",
        "Number format of the frozen base; auto: bf16 if the GPU supports it, else fp16; fp32 on a CPU.",
        "Training",
        may_change=True,
    )
    gradient_checkpointing: bool = key(
        False, "Save memory at the cost of speed: about 9 GiB instead of 17 for SDXL.", "Training", may_change=True
    )
    cuda_graphs: bool = expert(
        True,
        "On NVIDIA GPUs, record a step and replay it: the same result, faster if the GPU waits for Python. Not with "
        "gradient checkpointing.",
        "Training",
        may_change=True,
    )
    generated_steps: int = expert(
        30,
        "Denoising steps for images that a training generates itself: class images, ZipLoRA's teachers.",
        "Training",
        ge=1,
        le=1000,
    )
    generated_guidance: float = expert(
        5.0, "Classifier-free guidance for images that a training generates itself.", "Training", ge=1
    )
    device: str = key("auto", "Device: auto, cpu, cuda, mps.", "Training", may_change=True)
    seed: int = key(0, "Random seed.", "Training", ge=0)

    save_precision: Literal["fp16", "bf16", "fp32"] = expert("fp16", "Number format of the LoRA files.", "Output")
    formats: list[Literal["kohya", "diffusers"]] = expert(
        ["kohya"],
        "File layouts to write; kohya's, which every program reads, is always included.",
        "Output",
        may_change=True,
    )
    checkpoint_every: int = expert(
        200, "Steps between checkpoints; 0: only at the end and on interruption.", "Output", ge=0, may_change=True
    )
    save_every: int = key(
        0,
        "Steps between LoRAs to keep, each with a sample sheet, to choose from; 0: only the last.",
        "Output",
        ge=0,
        may_change=True,
    )
    sample_every: int = expert(0, "Steps between sample sheets; 0: only at the end.", "Output", ge=0, may_change=True)
    sample_steps: int = expert(30, "Denoising steps of samples.", "Output", ge=1, le=1000, may_change=True)
    sample_guidance: float = expert(5.0, "Classifier-free guidance of samples.", "Output", ge=1, may_change=True)
    sample_seeds: list[int] = expert(
        [0, 1], "Seeds of samples; none: no samples.", "Output", max_length=200, may_change=True
    )
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = expert(
        [], "Experiment trackers.", "Output", may_change=True
    )

    _natural = field_validator("sample_seeds")(natural_seeds)

    @field_validator("content", "style", "token", "sample_subject", "sample_style", check_fields=False)
    @classmethod
    def _plain_words(cls, text: str | None, info: ValidationInfo) -> str | None:
        return None if text is None else plain_words(text, style="style" in str(info.field_name))

    @field_validator("formats")
    @classmethod
    def _with_kohya(cls, layouts: list[str]) -> list[str]:
        return distinct(["kohya", *layouts])

    @field_validator("betas")
    @classmethod
    def _below_one(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError("each is at least 0 and below 1")
        return betas

    def noising(self) -> dict[str, Any]:
        """Return the keywords of `training.loss.denoising_loss` that decide how latents are noised and weighted."""
        return self.model_dump(include={"batch_size", "min_snr_gamma", "noise_offset", "timestep_shift"})

    def spread_over_steps(self) -> list[str]:
        """Return the settings whose effect on a step depends on the number of all steps."""
        return [] if self.schedule == "constant" else ["schedule"]

    def samples_at_once(self) -> int:
        """Return how many images of a sample sheet fit at once: guidance doubles each, and a training batch fits."""
        return max(1, min(self.batch_size // 2, len(self.sample_seeds)))

    def words(self) -> dict[str, str]:
        """Return the user's words by the placeholders of prompt templates."""
        named = {name: getattr(self, name, None) for name in ("token", "content", "style")}
        return {name: word for name, word in named.items() if word}

    def fill(self, template: str) -> str:
        """Fill {token}, {content} and {style} into a prompt template.

        Raises:
            UserError: the template has another placeholder, or one whose word is not set.
        """
        return fill(template, self.words())

    def style_trigger(self, template: str, word: str = "{style}") -> str:
        """Return the words that invoke a style after any subject, from the template of its training prompt."""
        prompt, end = self.fill(template), self.fill(f"in {word} style")
        return end if prompt.endswith(end) else style_words(prompt)

    def check_rates(self, **rates: float) -> None:
        """Refuse learning rates that do not fit the optimizer."""
        if self.optimizer == "prodigy" and any(0 < rate < 0.1 for rate in rates.values()):
            got = " and ".join(f"{rate:g}" for rate in rates.values())
            raise ValueError(
                f"Prodigy adapts the step size, so its learning rates are factors (got {got}): "
                f"set {' and '.join(rates)} to 1"
            )

    def filled_prompts(self) -> dict[str, str]:
        """Return the filled prompts by name, to show them before a run."""
        templates = {name.removesuffix("_prompt"): text for name, text in self if name.endswith("_prompt") and text}
        return {name: self.fill(text) for name, text in templates.items()}


class ImageConfig(TrainingConfig):
    """Keys of all trainings on images."""

    images: list[Path] = expert(
        ..., "Image file, or several that share what is to be learned.", "Input", min_length=1, private=True
    )
    masks: list[Path] = expert(
        [], "Subject masks, one per image; white areas count in the loss.", "Input", private=True
    )
    background_weight: float = expert(0.0, "Weight of the loss where the mask is black.", "Input", ge=0, le=1)
    crop: list[str] = key([], "Part to use, X,Y,W,H in pixels.", "Input")
    fit: Fit | None = expert(
        None,
        "bucket: SDXL's nearest proportions; crop: a square; pad: all of it. Default: bucket; bundled: crop.",
        "Input",
    )

    rank: int = key(64, "Rank of each LoRA; 2.9 MB per rank in SDXL's attentions.", "Training", ge=1)
    alpha: float | None = expert(None, "LoRA alpha (strength = alpha / rank); default: the rank.", "Training", gt=0)
    weight_decay: float = expert(1e-4, "Decoupled weight decay of the LoRA matrices.", "Training", ge=0)
    sample_subject: str = expert(
        "dog", "Another subject, for the style-alone sample.", "Output", min_length=1, may_change=True
    )
    sample_style: str = expert(
        "watercolor painting", "Another style, for the content-alone sample.", "Output", min_length=1, may_change=True
    )

    def prior_weights(self) -> dict[str, float]:
        """Return the weight of prior preservation by LoRA."""
        return {}

    @field_validator("crop", mode="before")
    @classmethod
    def _one_crop(cls, crops: Any) -> Any:
        """Accept one crop instead of a list, and four numbers instead of a text."""
        numbers = isinstance(crops, (list, tuple)) and all(isinstance(part, int) for part in crops) and crops
        crops = [crops] if isinstance(crops, str) or numbers else crops
        if not isinstance(crops, (list, tuple)):
            return crops
        return [",".join(map(str, crop)) if isinstance(crop, (list, tuple)) else crop for crop in crops]

    @field_validator("crop")
    @classmethod
    def _read_crops(cls, crops: list[str]) -> list[str]:
        return [",".join(map(str, read_crop(crop))) for crop in crops]

    @model_validator(mode="after")
    def _one_for_each_image(self) -> ImageConfig:
        for name in ("mask", "crop"):
            count = len(self.masks if name == "mask" else self.crop)
            if count and count != len(self.images):
                raise ValueError(f"{count} {name}s for {len(self.images)} images: give one {name} per image")
        return self


def default_fit(base: str) -> Fit:
    """Return how images are fitted to a base: in their own proportions, but the bundled base was trained on squares."""
    return "crop" if is_bundled(base) else "bucket"


def read_crop(text: str) -> tuple[int, int, int, int]:
    """Parse X,Y,W,H.

    Raises:
        ValueError: it is something else, or the part has no pixels.
    """
    try:
        left, top, width, height = (int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{text!r}: write X,Y,W,H in pixels, such as 0,120,1000,800") from None
    if min(left, top) < 0 or min(width, height) < 1:
        raise ValueError(f"{text!r}: X and Y are at least 0, W and H at least 1")
    return left, top, width, height


def style_words(style: str) -> str:
    """Return the words that invoke a style after any subject: the end of "an image in ink style", else the whole."""
    end = re.search(r".*\b(in .+ style)$", style)
    return end[1] if end else style
