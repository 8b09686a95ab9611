"""Style phrase, learned before the LoRAs (not part of the paper): textual inversion, then distillation.

1. Textual inversion (arXiv 2208.01618) of the phrase, everything else frozen: offsets to its token embeddings describe
   as much of the style as words can (`textual_inversion.PhraseOffsets`, `fit_offsets`).
2. A LoRA of the text encoders learns to embed the plain phrase as if the offsets were there (`distill_offsets`).

LoRAs that are trained with this phrase need not learn the style that it already describes (pivotal tuning, arXiv
2106.05744).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from PIL import Image
from torch import Tensor

from unziplora.images.filters import filtered
from unziplora.methods.data import latents_of
from unziplora.methods.unziplora.textual_inversion import PhraseOffsets
from unziplora.models.base import Base
from unziplora.models.offload import moved_to
from unziplora.models.text import Conditioning, encode_batch, join_streams
from unziplora.training.cuda_graphs import recording
from unziplora.training.loss import Examples, denoising_loss, generator, to_device
from unziplora.training.method import Setup
from unziplora.training.optimizers import make_schedule
from unziplora.training.text_encoder_lora import TextLora

if TYPE_CHECKING:
    from unziplora.config.split import SplitConfig

SUBJECTS = (
    *("cat", "dog", "house", "tree", "car", "flower", "boat", "bird", "apple", "chair", "mountain", "face", "fish"),
    *("castle", "bicycle", "guitar", "cup", "shoe", "lamp", "bridge", "horse", "clock", "book", "umbrella"),
)
"""Subjects of the prompts that distillation learns from."""

OTHER_STYLES = (
    *("watercolor painting", "oil painting", "pencil sketch", "neon sign", "pixel art", "mosaic", "photograph"),
    *("charcoal drawing", "3d render", "comic book", "stained glass", "poster"),
)
"""Styles whose prompts must keep their embeddings during distillation."""

ORIGINAL_SHARE = 0.75
"""Share of the samples that are drawn from the images themselves; the rest is drawn from them and their variants."""

DISTILLATION_STEPS, DISTILLATION_BATCH, DISTILLATION_RATE = 80, 8, 6e-3
LOSS_SCALE = 1024.0
"""Factor that keeps fp16 gradients from underflow; Adam's steps do not depend on it."""


def learn_style_phrase(
    setup: Setup, config: SplitConfig, images: Sequence[Image.Image], examples: Examples
) -> tuple[TextLora, Examples | None]:
    """Learn the style phrase into a LoRA of the text encoders.

    A resumed run loads both results from its checkpoint (`TrainingData.restored`), so nothing is learned here.

    Args:
        setup: the base, without LoRAs; its VAE leaves the device.
        config: the recipe.
        images: the training images.
        examples: the same images, encoded.

    Returns:
        The text encoders' LoRA; and with `content_variants` the images with their variants for the content LoRA.
    """
    if config.content_variants:
        examples = _add_variants(setup.base, images, examples)
    setup.make_room(config, keep_text=True)
    offsets = PhraseOffsets(setup.base, config.style, len(examples.latents) // len(images), config.phrase_words)
    with moved_to(setup.base.text_encoders, setup.base.device):
        prompt = config.fill("a {content} in {style} style")
        if not setup.resumed:
            setup.report(f"learning the phrase {config.style!r}")
            fit_offsets(offsets, setup.noise_schedule(), examples, prompt, config, setup.autocast, setup.progress)
        variants = None
        if config.content_variants:
            variants = to_device(encode_variant_prompts(offsets, examples, config), setup.base)
        text = TextLora(setup.base, config) if setup.resumed else distill_offsets(offsets, config)
        return text, variants


def _add_variants(base: Base, images: Sequence[Image.Image], examples: Examples) -> Examples:
    """Append the variants of all images: all under the first filter, then all under the second, and so on."""
    by_filter = zip(*(filtered(image)[1:] for image in images), strict=True)
    more = latents_of(base, [image for row in by_filter for image in row])
    latents = torch.cat([examples.latents, more.to(examples.latents)])
    index = torch.arange(len(latents)) % len(images)
    weights = None if examples.weights is None else examples.weights[index]
    return Examples(latents, examples.conditioning.take(index), weights)


def fit_offsets(
    offsets: PhraseOffsets,
    scheduler: DDPMScheduler,
    examples: Examples,
    prompt: str,
    config: SplitConfig,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> None:
    """Fit the offsets to the images by the denoising loss, everything else frozen (arXiv 2208.01618, equation 2).

    Args:
        offsets: fitted in place; its base's UNet and text encoders are on the device.
        scheduler: noise schedule and prediction type of the base.
        examples: equally many images of every variant, those of the first variant first; of their conditioning only
            the time ids count.
        prompt: contains the phrase.
        config: the recipe.
        autocast: context of the forward passes.
        progress: called with steps done and steps in all.
    """
    parts = (offsets.free, config.phrase_learning_rate), (offsets.word_weights, config.phrase_word_rate)
    optimizer = torch.optim.Adam([{"params": params, "lr": rate} for params, rate in parts])
    schedule = make_schedule(optimizer, config.schedule, config.phrase_steps)
    with recording(offsets.base.unet, [], config) as predict:
        for step in range(config.phrase_steps):
            progress(step, config.phrase_steps)
            draw = generator(config.seed, "phrase", step)
            index = _draw_images(offsets, len(examples.latents), config.batch_size, draw)
            with offsets.applied(index * offsets.variants // len(examples.latents)), autocast():
                rows = encode_batch(offsets.base, [prompt] * len(index))
                weights = None if examples.weights is None else examples.weights[index]
                conditioning = rows.with_time_ids(examples.conditioning.take(index).time_ids)
                batch = Examples(examples.latents[index], conditioning, weights)
                loss = denoising_loss(predict, scheduler, batch, draw=draw, **config.noising())
            optimizer.zero_grad()
            (loss * LOSS_SCALE).backward()
            optimizer.step()
            schedule.step()


def _draw_images(offsets: PhraseOffsets, images: int, count: int, draw: torch.Generator) -> Tensor:
    """Draw the images of one step, [count], about `ORIGINAL_SHARE` of them from the first variant, the originals."""
    first = torch.randint(images // offsets.variants, (count,), generator=draw)
    any_variant = torch.randint(images, (count,), generator=draw)
    return torch.where(torch.rand(count, generator=draw) < ORIGINAL_SHARE, first, any_variant)


@torch.no_grad()
def encode_variant_prompts(offsets: PhraseOffsets, examples: Examples, config: SplitConfig) -> Examples:
    """Return the examples with the full prompt as base and LoRAs read it, each variant with its own offsets."""
    count = len(examples.latents)
    with offsets.applied(torch.arange(count) * offsets.variants // count):
        rows = encode_batch(offsets.base, [config.prompts()["full"]] * count)
    tokens = join_streams(*[rows.tokens] * 3) if config.prompt_separation else rows.tokens
    return replace(examples, conditioning=Conditioning(tokens, rows.pooled, examples.conditioning.time_ids))


def distill_offsets(offsets: PhraseOffsets, config: SplitConfig) -> TextLora:
    """Train a LoRA of the text encoders that embeds the plain phrase as if the offsets were applied.

    It learns from prompts alone. Prompts with the phrase get the embeddings that they have with the offsets; all others
    keep theirs.

    Args:
        offsets: fitted.
        config: the recipe; its words, rank and seed.
    """
    base = offsets.base
    with_phrase, without_phrase = _distillation_prompts(offsets, config)
    with torch.no_grad():
        plain, unchanged = encode_batch(base, with_phrase), encode_batch(base, without_phrase)
        with offsets.applied():
            goal = encode_batch(base, with_phrase)
    tokens, pooled = torch.cat([goal.tokens, unchanged.tokens]), torch.cat([goal.pooled, unchanged.pooled])
    sizes = [
        (a.float() - b.float()).square().mean().clamp(min=1e-8)
        for a, b in ((goal.tokens, plain.tokens), (goal.pooled, plain.pooled))
    ]
    lora, prompts = TextLora(base, config), with_phrase + without_phrase
    # Gradients of a mean over two million numbers are too small for fp16.
    factor = LOSS_SCALE if base.dtype == torch.float16 else 1.0
    optimizer = torch.optim.Adam(lora.parameters(), lr=DISTILLATION_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, DISTILLATION_STEPS)
    for step in range(DISTILLATION_STEPS):
        draw = generator(config.seed, "teach", step)
        index = torch.randperm(len(prompts), generator=draw)[:DISTILLATION_BATCH].tolist()
        rows = encode_batch(base, [prompts[number] for number in index])
        pairs = (rows.tokens, tokens[index]), (rows.pooled, pooled[index])
        errors = [(output.float() - target.float()).square().mean() for output, target in pairs]
        optimizer.zero_grad()
        ((errors[0] / sizes[0] + errors[1] / sizes[1]) * factor).backward()
        optimizer.step()
        schedule.step()
    return lora


def _distillation_prompts(offsets: PhraseOffsets, config: SplitConfig) -> tuple[list[str], list[str]]:
    """Return the prompts with the phrase, whose embeddings change, and those without it, whose embeddings stay."""
    prompts = config.prompts()
    styled = [config.fill(f"a {subject} in {{style}} style") for subject in SUBJECTS]
    with_phrase = [prompts["full"], prompts["style"], config.fill("a {content} in {style} style"), *styled]
    own = [config.fill("a {token} {content} in ") + f"{style} style" for style in OTHER_STYLES]
    others = [f"a {subject} in {style} style" for subject, style in zip(SUBJECTS, OTHER_STYLES, strict=False)]
    plain = [prompts["content"], config.fill("a {content}"), "an image", *(f"a {subject}" for subject in SUBJECTS)]
    # The phrase may be one of OTHER_STYLES: no prompt can be embedded both ways.
    without_phrase = [text for text in (*plain, *own, *others) if not offsets.occur_in(text)]
    return list(dict.fromkeys(with_phrase)), without_phrase
