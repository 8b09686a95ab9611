"""Recipes of `sample` and `grid`."""

from __future__ import annotations

import math
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from pydantic import field_validator, model_validator

from unziplora.config.recipe import KINDS, Precision, Recipe, expert, key, natural_seeds

# name → diffusers class and changes to its configuration; latents are never clipped to −1…1
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "dpm++_2m": ("DPMSolverMultistepScheduler", {}),
    "dpm++_2m_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "dpm++_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpm++_2m_sde_karras": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
    ),
    "unipc": ("UniPCMultistepScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
}

SCHEDULER_NAMES = ("base", *SCHEDULERS)

Axis = Literal["auto", "prompt", "seed", "content_strength", "style_strength"]


class GenerationConfig(Recipe):
    """Keys that `sample` and `grid` share."""

    content: Path | None = key(None, "Run folder or LoRA file for the content.", "Input")
    style: Path | None = key(None, "Run folder or LoRA file for the style.", "Input")
    base: str | None = key(None, "Base model; default: the one that the run was trained on.", "Input")
    out: Path = key(Path("samples"), "Folder for the images.", "Input")

    prompts: list[str] = key(
        [],
        "Prompt; {token}, {content} and {style} stand for the runs' words. Default: the runs' own prompts.",
        "Prompts",
    )
    content_prompt: str | None = expert(
        None, "Prompt for the content LoRA in separate mode; default: as in its run.", "Prompts"
    )
    style_prompt: str | None = expert(
        None, "Prompt for the style LoRA in separate mode; default: as in its run.", "Prompts"
    )
    mode: Literal["auto", "separate", "direct"] = expert(
        "auto",
        "Combination of both LoRAs. separate: a prompt for each, as in training; direct: one prompt, as in most UIs; "
        "auto: separate if the words are known.",
        "Prompts",
    )
    negative: str = key("", "Negative prompt.", "Prompts")

    content_strength: float = key(1.0, "Strength of the content LoRA.", "Strength")
    style_strength: float = key(1.0, "Strength of the style LoRA.", "Strength")
    content_blocks: list[str] = expert(
        [], "Strength per block of the content LoRA, such as up_blocks.0.attentions.1=0.5.", "Strength"
    )
    style_blocks: list[str] = expert([], "Strength per block of the style LoRA.", "Strength")

    steps: int = key(30, "Denoising steps.", "Sampling", ge=1, le=1000)
    guidance: float | None = key(
        None, "Classifier-free guidance; 1 switches it off; default: as in the run, else 5.", "Sampling", ge=1
    )
    guidance_rescale: float = expert(
        0.0, "Guidance rescale (arXiv 2305.08891); 0.7 suits zero-terminal SNR.", "Sampling", ge=0, le=1
    )
    scheduler: str = key("base", f"Sampler: {', '.join(SCHEDULER_NAMES)}.", "Sampling")
    width: int | None = key(None, "Pixels, a multiple of 8; default: as trained.", "Sampling", ge=8, le=8192)
    height: int | None = key(None, "Pixels, a multiple of 8; default: as trained.", "Sampling", ge=8, le=8192)
    seeds: list[int] = key([0], "Seeds; one image per seed and prompt.", "Sampling", min_length=1)
    precision: Precision = expert("auto", "Number format of the base.", "Sampling")
    device: str = key("auto", "Device: auto, cpu, cuda, mps.", "Sampling")

    @field_validator("scheduler")
    @classmethod
    def _known_scheduler(cls, name: str) -> str:
        """Return the name as in `SCHEDULERS` for one such as 'DPM++ 2M Karras'."""
        key = name.strip().lower().replace(" ", "_").replace("-", "_")
        if key not in SCHEDULER_NAMES:
            near = get_close_matches(key, SCHEDULER_NAMES, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"unknown; {hint}Known are {', '.join(SCHEDULER_NAMES)}")
        return key

    @field_validator("width", "height")
    @classmethod
    def _whole_latents(cls, side: int | None) -> int | None:
        if side is not None and side % 8:
            raise ValueError(f"must be a multiple of 8; the nearest is {max(8, round(side / 8) * 8)}")
        return side

    _natural = field_validator("seeds")(natural_seeds)

    @field_validator("content_blocks", "style_blocks")
    @classmethod
    def _pairs(cls, entries: list[str]) -> list[str]:
        read_blocks(entries)
        return entries

    @model_validator(mode="after")
    def _consistent(self) -> GenerationConfig:
        both = self.content is not None and self.style is not None
        for name in KINDS:
            for dial, neutral in (("strength", 1), ("blocks", [])):
                if getattr(self, name) is None and getattr(self, f"{name}_{dial}") != neutral:
                    raise ValueError(f"{name}_{dial} without a {name} LoRA: give --{name} too")
            if getattr(self, f"{name}_prompt") is not None and (self.mode == "direct" or not both):
                raise ValueError(f"{name}_prompt is for two LoRAs with separate prompts: use --prompts")
        if self.mode == "separate" and not both:
            raise ValueError("mode separate is for two LoRAs: give --content and --style")
        if any(not text.strip() for text in [*self.prompts, self.content_prompt or "-", self.style_prompt or "-"]):
            raise ValueError("a prompt is empty: describe the image")
        if self.content is None and self.style is None and not self.prompts:
            raise ValueError("nothing to show: give --content, --style or --prompts")
        return self


class SampleConfig(GenerationConfig):
    """Generate images with a content LoRA, a style LoRA, both, or neither."""

    batch_size: int = key(1, "Images computed at once.", "Sampling", ge=1)


class GridConfig(GenerationConfig):
    """Generate a labeled grid of images: strength × strength, or prompts × seeds."""

    out: Path = key(Path("grid.png"), "PNG file to write.", "Input")
    rows: Axis = key("auto", "Axis from row to row; auto: content strength with two LoRAs, else prompts.", "Grid")
    columns: Axis = key(
        "auto",
        "Axis along a row; auto: style strength with two LoRAs, else the strengths that are listed, or seeds.",
        "Grid",
    )
    content_strengths: list[float] = key([0.0, 0.5, 1.0], "Strengths on a content axis.", "Grid", min_length=1)
    style_strengths: list[float] = key([0.0, 0.5, 1.0], "Strengths on a style axis.", "Grid", min_length=1)

    @field_validator("out")
    @classmethod
    def _picture(cls, out: Path) -> Path:
        if out.suffix.lower() != ".png" or out.is_dir():
            raise ValueError("give the name of a .png file")
        return out

    @model_validator(mode="after")
    def _axes(self) -> GridConfig:
        rows, columns = self.axes()
        if rows == columns:
            raise ValueError(f"rows and columns both show {rows}: choose two different ones")
        for axis in (rows, columns):
            if axis.endswith("_strength") and getattr(self, axis.removesuffix("_strength")) is None:
                raise ValueError(f"an axis of {axis} needs --{axis.removesuffix('_strength')}")
        for name in KINDS:
            shown = f"{name}_strength" in (rows, columns)
            if shown and self._chosen(f"{name}_strength"):
                raise ValueError(f"an axis changes {name}_strength: give {name}_strengths, or choose another axis")
            if not shown and self._chosen(f"{name}_strengths"):
                raise ValueError(f"no axis shows {name}_strengths: add --columns {name}_strength")
        for axis, values in (("prompt", self.prompts), ("seed", self.seeds)):
            if len(values) > 1 and axis not in (rows, columns):
                raise ValueError(f"{len(values)} {axis}s, but no axis shows them: give one, or --columns {axis}")
        return self

    def axes(self) -> tuple[str, str]:
        """Return the axes of rows and columns."""
        both = self.content is not None and self.style is not None and len(self.prompts) < 2
        rows = "content_strength" if both and self.columns != "content_strength" else "prompt"
        columns = "style_strength" if both and self.rows != "style_strength" else "seed"
        if not both:
            listed = [f"{name}_strength" for name in KINDS if self._chosen(f"{name}_strengths")]
            columns = next((axis for axis in listed if axis != self.rows), columns)
        return (rows if self.rows == "auto" else self.rows, columns if self.columns == "auto" else self.columns)

    def _chosen(self, name: str) -> bool:
        return name in self.model_fields_set


def read_blocks(entries: list[str]) -> dict[str, float]:
    """Parse block strengths such as ['up_blocks.0=0.5'] into a mapping from block to strength.

    Raises:
        ValueError: an entry is not of the form block=strength, or a block has two.
    """
    blocks: dict[str, float] = {}
    for entry in entries:
        name, sign, value = entry.partition("=")
        try:
            strength = float(value)
        except ValueError:
            strength = math.nan
        if not sign or not name.strip() or not math.isfinite(strength):
            raise ValueError(f"{entry!r}: write block=strength, such as up_blocks.0.attentions.1=0.5")
        block = name.strip().strip(".")
        if block in blocks:
            raise ValueError(f"{block} has two strengths, {blocks[block]:g} and {strength:g}: leave one of them out")
        blocks[block] = strength
    return blocks
