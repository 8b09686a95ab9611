"""Check that the content and the style of a finished split came apart.

The content LoRA alone draws in two styles, the style LoRA alone draws two subjects. `metrics.separation` compares
these images with those that the base draws for the same words and seeds, and with the learned ones. On the bundled base
the benchmark's networks see them, on another base the two models that the recipe names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from unziplora.config.bases import is_bundled
from unziplora.config.recipe import KINDS
from unziplora.config.split import SplitConfig
from unziplora.config.templates import same_words
from unziplora.metrics.embedders import DINO, ImageModel, ModelMeasure
from unziplora.metrics.measures import CaseMeasure, Trained
from unziplora.metrics.separation import Alone, Separation, measure_separation
from unziplora.metrics.vision_models import CLIP, check_vision_model
from unziplora.models.base import Base
from unziplora.models.text import Prompts
from unziplora.training.method import Findings, Method, View
from unziplora.training.sample_sheet import generate_view

if TYPE_CHECKING:
    import torch
    from PIL import Image

STYLES = ("watercolor painting", "pencil sketch", "oil painting", "neon sign")
CONTENTS = ("house", "guitar", "rocket", "penguin")
"""Styles to draw the content in, and subjects to draw in the style; every base knows them."""

PROMPTS, SEEDS = 2, [0, 1]
"""Prompts for each LoRA, the first of those above, and the seeds of each."""

STEPS, STEPS_BUNDLED = 20, 8
"""Denoising steps of these images; the small base is judged as well after a few (experiments/check.md)."""

GAIN, LEAK = 0.1, 0.3
"""A LoRA has learned something if it adds at least this share of what the base lacks; more than the second share of
what belongs to the other LoRA is too much (docs/method.md, "The check")."""


def check_models(config: SplitConfig) -> None:
    """Refuse models that the check cannot use, before anything is trained.

    Raises:
        UserError: one of them cannot be found, or is of another type.
    """
    if config.dino and config.clip:
        check_vision_model(DINO, config.dino)
        check_vision_model(CLIP, config.clip)


def check_loras(method: Method[SplitConfig], config: SplitConfig, base: Base) -> Findings:
    """Draw with both LoRAs of a finished split alone, and compare.

    Raises:
        UserError: a model that the recipe names cannot be loaded.
        OutOfMemory: memory does not suffice.
    """
    measure = _measure(config, base.device)
    drawing = config.model_copy(update={"sample_seeds": SEEDS, "sample_steps": drawing_steps(config)})

    def draw(prompts: Iterable[str], off: tuple[str, ...]) -> list[Image.Image]:
        views = [View("", Prompts(prompt), off) for prompt in prompts]
        return [image for view in views for image in generate_view(base, method, drawing, view)]

    content, style = prompts_alone(config)
    found = measure_separation(
        measure,
        method.images,
        content=Alone(draw(content, ("style",)), draw((without_token(text, config) for text in content), KINDS)),
        style=Alone(draw(style, ("content",)), draw(style, KINDS)),
    )
    return Findings(_figures(found), [_headline(found), *_sentences(found, config)])


def drawing_steps(config: SplitConfig) -> int:
    """Return the denoising steps of the check's images."""
    return STEPS_BUNDLED if is_bundled(config.base) else STEPS


def prompts_alone(config: SplitConfig) -> tuple[list[str], list[str]]:
    """Return the prompts of the content LoRA and of the style LoRA, without those that name what was learned."""
    words = config.prompts()["content"]
    styles = [style for style in STYLES if not same_words(style, config.style)][:PROMPTS]
    contents = [content for content in CONTENTS if not same_words(content, config.content)][:PROMPTS]
    return [f"{words} in {style} style" for style in styles], [
        config.fill(f"a {x} in {{style}} style") for x in contents
    ]


def without_token(prompt: str, config: SplitConfig) -> str:
    """Return a prompt for the base, to which the rare word means nothing."""
    return " ".join(re.sub(rf"(?<!\w){re.escape(config.token)}(?!\w)", "", prompt).split())


def _measure(config: SplitConfig, device: torch.device) -> CaseMeasure:
    if config.dino and config.clip:
        contents, styles = ImageModel("dino", config.dino, device), ImageModel("clip", config.clip, device)
        return ModelMeasure("dino-clip", contents, styles)
    assert is_bundled(config.base), "SplitConfig.is_checked"
    return Trained()


def _figures(found: Separation) -> dict[str, Any]:
    parts = {name: getattr(found, name) for name in KINDS}
    figures = {name: {**asdict(part), "score": part.score} for name, part in parts.items()}
    rounded = {name: {key: round(value, 4) for key, value in part.items()} for name, part in figures.items()}
    return {"score": round(found.score, 4), **rounded}


def _headline(found: Separation) -> str:
    return (
        f"Content and style came apart to {found.score:.2f} of 1 "
        f"(content alone {found.content.score:.2f}, style alone {found.style.score:.2f})."
    )


def _sentences(found: Separation, config: SplitConfig) -> list[str]:
    """Describe what is wrong, each with the setting that changes it."""
    content, style, lines = found.content, found.style, []
    if content.gain < GAIN:
        lines.append(
            f"The content LoRA alone draws this {config.content} hardly better than the base: raise "
            f"content_learning_rate ({config.content_learning_rate:g}) or steps ({config.steps})."
        )
    if content.leak > LEAK:
        lines.append(
            f"The content carries the style along: lower content_learning_rate ({config.content_learning_rate:g})."
        )
    if style.gain < GAIN:
        lines.append(
            f"The style LoRA alone hardly brings the style: raise style_learning_rate "
            f"({config.style_learning_rate:g}) or steps ({config.steps})."
        )
    if style.leak > LEAK:
        lines.append(
            f"The style carries the subject along: lower style_learning_rate ({config.style_learning_rate:g})."
        )
    return lines
