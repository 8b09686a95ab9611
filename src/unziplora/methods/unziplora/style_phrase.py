"""The style's words first: its phrase is learned, then a LoRA of the text encoders makes the same of the plain words.

Textual inversion (arXiv 2208.01618) of the phrase with everything else frozen says as much of the style as words can.
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
from unziplora.methods.unziplora.textual_inversion import Phrase
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

THINGS = (
    *("cat", "dog", "house", "tree", "car", "flower", "boat", "bird", "apple", "chair", "mountain", "face", "fish"),
    *("castle", "bicycle", "guitar", "cup", "shoe", "lamp", "bridge", "horse", "clock", "book", "umbrella"),
)
"""What the phrase is said of while the text encoders learn it."""

STYLES = (
    *("watercolor painting", "oil painting", "pencil sketch", "neon sign", "pixel art", "mosaic", "photograph"),
    *("charcoal drawing", "3d render", "comic book", "stained glass", "poster"),
)
"""Styles whose prompts stay as they are."""

FIRST = 0.75
"""Share of the phrase's steps for the picture itself; the rest is for it and its variants alike."""

TEACHING_STEPS, TEACHING_BATCH, TEACHING_RATE = 80, 8, 6e-3
LOSS_SCALE = 1024.0
"""Keeps fp16 gradients from underflow; Adam's steps do not depend on it."""


def learn_style_phrase(
    setup: Setup, config: SplitConfig, pictures: Sequence[Image.Image], examples: Examples
) -> tuple[TextLora, Examples | None]:
    """Learn the style's phrase and leave it in the text encoders.

    A resumed run finds both in its checkpoint (`TrainingData.restored`), so nothing is learned for it here.

    Args:
        setup: the base, without LoRAs; its VAE leaves the device.
        config: the recipe.
        pictures: what is learned from.
        examples: the same, encoded.

    Returns:
        The text encoders' LoRA, and the pictures with their variants for the content LoRA, if the recipe asks for them.
    """
    if config.content_variants:
        examples = _with_variants(setup.base, pictures, examples)
    setup.make_room(config, keep_text=True)
    phrase = Phrase(setup.base, config.style, len(examples.latents) // len(pictures), config.phrase_words)
    with moved_to(setup.base.text_encoders, setup.base.device):
        prompt = config.fill("a {content} in {style} style")
        if not setup.resumed:
            setup.report(f"learning the phrase {config.style!r}")
            learn_phrase(phrase, setup.noise_schedule(), examples, prompt, config, setup.autocast)
        variants = (
            to_device(variant_examples(phrase, examples, config), setup.base) if config.content_variants else None
        )
        text = TextLora(setup.base, config) if setup.resumed else teach_encoders(phrase, config)
        return text, variants


def _with_variants(base: Base, pictures: Sequence[Image.Image], examples: Examples) -> Examples:
    """The pictures, then all of them under the first filter, the second …; told as the pictures are."""
    by_filter = zip(*(filtered(picture)[1:] for picture in pictures), strict=True)
    more = latents_of(base, [picture for row in by_filter for picture in row])
    latents = torch.cat([examples.latents, more.to(examples.latents)])
    index = torch.arange(len(latents)) % len(pictures)
    weights = None if examples.weights is None else examples.weights[index]
    return Examples(latents, examples.conditioning.take(index), weights)


def learn_phrase(
    phrase: Phrase,
    scheduler: DDPMScheduler,
    examples: Examples,
    prompt: str,
    config: SplitConfig,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> None:
    """Fit the offsets to the pictures by the denoising loss, everything else frozen (arXiv 2208.01618, equation 2).

    Args:
        phrase: its base's UNet and text encoders are on the device.
        scheduler: how the base sees noise.
        examples: the pictures of every reading, as many of each, the first reading's first; their conditioning is
            told anew in every step.
        prompt: with the phrase in it.
        config: the recipe.
        autocast: context of the forward passes.
    """
    parts = (phrase.free, config.phrase_learning_rate), (phrase.shares, config.phrase_word_rate)
    optimizer = torch.optim.Adam([{"params": params, "lr": rate} for params, rate in parts])
    schedule = make_schedule(optimizer, config.schedule, config.phrase_steps)
    with recording(phrase.base.unet, [], config) as predict:
        for step in range(config.phrase_steps):
            draw = generator(config.seed, "phrase", step)
            index = _drawn(phrase, len(examples.latents), config.batch_size, draw)
            with phrase.applied(index * phrase.readings // len(examples.latents)), autocast():
                rows = encode_batch(phrase.base, [prompt] * len(index))
                weights = None if examples.weights is None else examples.weights[index]
                conditioning = rows.with_time_ids(examples.conditioning.take(index).time_ids)
                drawn = Examples(examples.latents[index], conditioning, weights)
                loss = denoising_loss(predict, scheduler, drawn, draw=draw, **config.noising())
            optimizer.zero_grad()
            (loss * LOSS_SCALE).backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def variant_examples(phrase: Phrase, examples: Examples, config: SplitConfig) -> Examples:
    """The pictures with the full prompt in their own readings, as all LoRAs shall see it."""
    count = len(examples.latents)
    with phrase.applied(torch.arange(count) * phrase.readings // count):
        rows = encode_batch(phrase.base, [config.prompts()["full"]] * count)
    tokens = join_streams(*[rows.tokens] * 3) if config.prompt_separation else rows.tokens
    return replace(examples, conditioning=Conditioning(tokens, rows.pooled, examples.conditioning.time_ids))


def _drawn(phrase: Phrase, pictures: int, count: int, draw: torch.Generator) -> Tensor:
    """Pictures to learn from in one step, about `FIRST` of them of the first reading, the style itself, [count]."""
    first = torch.randint(pictures // phrase.readings, (count,), generator=draw)
    any_reading = torch.randint(pictures, (count,), generator=draw)
    return torch.where(torch.rand(count, generator=draw) < FIRST, first, any_reading)


def teach_encoders(phrase: Phrase, config: SplitConfig) -> TextLora:
    """Put a LoRA into the text encoders that makes of the plain phrase what `phrase` has learned.

    It learns from prompts alone: those with the phrase shall be embedded as with the offsets, all others as without.

    Args:
        phrase: learned.
        config: the recipe; its words, rank and seed.
    """
    base = phrase.base
    said, kept = _lessons(phrase, config)
    with torch.no_grad():
        plain, kept_rows = encode_batch(base, said), encode_batch(base, kept)
        with phrase.applied():
            goal = encode_batch(base, said)
    tokens, pooled = torch.cat([goal.tokens, kept_rows.tokens]), torch.cat([goal.pooled, kept_rows.pooled])
    sizes = [
        (a.float() - b.float()).square().mean().clamp(min=1e-8)
        for a, b in ((goal.tokens, plain.tokens), (goal.pooled, plain.pooled))
    ]
    adapter, texts = TextLora(base, config), said + kept
    factor = LOSS_SCALE if base.dtype == torch.float16 else 1.0  # of two million numbers' mean: too small for fp16
    optimizer = torch.optim.Adam(adapter.parameters(), lr=TEACHING_RATE)
    slowing = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, TEACHING_STEPS)
    for step in range(TEACHING_STEPS):
        index = torch.randperm(len(texts), generator=generator(config.seed, "teach", step))[:TEACHING_BATCH].tolist()
        rows = encode_batch(base, [texts[number] for number in index])
        pairs = (rows.tokens, tokens[index]), (rows.pooled, pooled[index])
        errors = [(made.float() - wanted.float()).square().mean() for made, wanted in pairs]
        optimizer.zero_grad()
        ((errors[0] / sizes[0] + errors[1] / sizes[1]) * factor).backward()
        optimizer.step()
        slowing.step()
    return adapter


def _lessons(phrase: Phrase, config: SplitConfig) -> tuple[list[str], list[str]]:
    """The prompts with the phrase, which the text encoders shall learn, and those without, which stay as they are."""
    prompts = config.prompts()
    styled = [config.fill(f"a {thing} in {{style}} style") for thing in THINGS]
    said = [prompts["full"], prompts["style"], config.fill("a {content} in {style} style"), *styled]
    own = [config.fill("a {token} {content} in ") + f"{style} style" for style in STYLES]
    others = [f"a {thing} in {style} style" for thing, style in zip(THINGS, STYLES, strict=False)]
    plain = [prompts["content"], config.fill("a {content}"), "an image", *(f"a {thing}" for thing in THINGS)]
    # The phrase may be one of STYLES: no prompt can be embedded both ways.
    kept = [text for text in (*plain, *own, *others) if not phrase.occurs_in(text)]
    return list(dict.fromkeys(said)), kept
