"""Style phrase, learned before the LoRAs (not part of the paper): textual inversion, then distillation.

1. Textual inversion (arXiv 2208.01618) of the phrase, everything else frozen: offsets to its token embeddings describe
   as much of the style as words can (`textual_inversion.PhraseOffsets`, `fit_offsets`).
2. A LoRA of the text encoders learns to embed the plain phrase as if the offsets were there (`distill_offsets`).

LoRAs that are trained with this phrase need not learn the style that it already describes (pivotal tuning, arXiv
2106.05744).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from unziplora.images.filters import filtered
from unziplora.methods.data import latents_of
from unziplora.methods.unziplora.textual_inversion import PhraseOffsets
from unziplora.models.base import Base
from unziplora.models.offload import moved_to
from unziplora.models.text import Conditioning, encode_batch, join_streams
from unziplora.training.cuda_graphs import Predict, recording
from unziplora.training.loss import Examples, denoising_loss, generator, to_device
from unziplora.training.method import Setup
from unziplora.training.optimizers import make_schedule
from unziplora.training.phases import Phase
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
        if not setup.resumed:
            setup.report(f"learning the phrase {config.style!r}")
            with recording(setup.base.unet, [], config) as predict:
                setup.phases.learn(Inversion(offsets, setup, examples, config, predict))
        variants = None
        if config.content_variants:
            variants = to_device(encode_variant_prompts(offsets, examples, config), setup.base)
        if setup.resumed:
            return TextLora(setup.base, config), variants
        distillation = Distillation(offsets, config)
        setup.phases.learn(distillation)
        return distillation.lora, variants


def _add_variants(base: Base, images: Sequence[Image.Image], examples: Examples) -> Examples:
    """Append the variants of all images: all under the first filter, then all under the second, and so on."""
    by_filter = zip(*(filtered(image)[1:] for image in images), strict=True)
    more = latents_of(base, [image for row in by_filter for image in row])
    latents = torch.cat([examples.latents, more.to(examples.latents)])
    index = torch.arange(len(latents)) % len(images)
    weights = None if examples.weights is None else examples.weights[index]
    return Examples(latents, examples.conditioning.take(index), weights)


class Inversion(Phase):
    """Fit of the offsets to the images by the denoising loss, everything else frozen (arXiv 2208.01618, equation 2)."""

    name = "the phrase"

    def __init__(
        self, offsets: PhraseOffsets, setup: Setup, examples: Examples, config: SplitConfig, predict: Predict
    ) -> None:
        """Prepare the fit of offsets, in place.

        Args:
            examples: equally many images of every variant, those of the first variant first; of their conditioning only
                the time ids count.
            predict: the UNet, or its recorded passes.
        """
        self.offsets, self.examples, self.config, self.predict = offsets, examples, config, predict
        self.scheduler, self.autocast = setup.noise_schedule(), setup.autocast
        self.steps, self.prompt = config.phrase_steps, config.fill("a {content} in {style} style")
        rate = config.phrase_word_rate if offsets.is_mixture else config.phrase_learning_rate
        self.optimizer = torch.optim.Adam(offsets.learned, lr=rate)
        self.schedule = make_schedule(self.optimizer, config.schedule, self.steps)

    def step(self, number: int) -> float:
        offsets, examples, config = self.offsets, self.examples, self.config
        draw = generator(config.seed, "phrase", number)
        index = _draw_images(offsets, len(examples.latents), config.batch_size, draw)
        with offsets.applied(index * offsets.variants // len(examples.latents)), self.autocast():
            rows = encode_batch(offsets.base, [self.prompt] * len(index))
            weights = None if examples.weights is None else examples.weights[index]
            conditioning = rows.with_time_ids(examples.conditioning.take(index).time_ids)
            batch = Examples(examples.latents[index], conditioning, weights)
            loss = denoising_loss(self.predict, self.scheduler, batch, draw=draw, **config.noising())
        self.optimizer.zero_grad()
        (loss * LOSS_SCALE).backward()
        self.optimizer.step()
        self.schedule.step()
        offsets.keep_mixture()
        return float(loss.detach())

    def state_dict(self) -> dict[str, Any]:
        parts = self.offsets.learned, self.optimizer.state_dict(), self.schedule.state_dict()
        return dict(zip(("offsets", "optimizer", "schedule"), parts, strict=True))

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for parameter, saved in zip(self.offsets.learned, state["offsets"], strict=True):
            parameter.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])


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
    tokens = join_streams(*[rows.tokens] * 3) if config.separates_prompts else rows.tokens
    return replace(examples, conditioning=Conditioning(tokens, rows.pooled, examples.conditioning.time_ids))


class Distillation(Phase):
    """Training of a LoRA of the text encoders that embeds the plain phrase as if the offsets were applied.

    It learns from prompts alone. Prompts with the phrase get the embeddings that they have with the offsets; all others
    keep theirs.
    """

    name = "the text encoders' LoRA"

    def __init__(self, offsets: PhraseOffsets, config: SplitConfig) -> None:
        """Embed the prompts with fitted offsets, and add the LoRA to the text encoders."""
        base = offsets.base
        with_phrase, without_phrase = _distillation_prompts(offsets, config)
        with torch.no_grad():
            plain, unchanged = encode_batch(base, with_phrase), encode_batch(base, without_phrase)
            with offsets.applied():
                goal = encode_batch(base, with_phrase)
        self.tokens = torch.cat([goal.tokens, unchanged.tokens])
        self.pooled = torch.cat([goal.pooled, unchanged.pooled])
        self.sizes = [
            (a.float() - b.float()).square().mean().clamp(min=1e-8)
            for a, b in ((goal.tokens, plain.tokens), (goal.pooled, plain.pooled))
        ]
        self.base, self.seed, self.steps = base, config.seed, DISTILLATION_STEPS
        self.lora, self.prompts = TextLora(base, config), with_phrase + without_phrase
        # Gradients of a mean over two million numbers are too small for fp16.
        self.factor = LOSS_SCALE if base.dtype == torch.float16 else 1.0
        self.optimizer = torch.optim.Adam(self.lora.parameters(), lr=DISTILLATION_RATE)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, self.steps)

    def step(self, number: int) -> float:
        draw = generator(self.seed, "teach", number)
        index = torch.randperm(len(self.prompts), generator=draw)[:DISTILLATION_BATCH].tolist()
        rows = encode_batch(self.base, [self.prompts[number] for number in index])
        pairs = (rows.tokens, self.tokens[index]), (rows.pooled, self.pooled[index])
        errors = [(output.float() - target.float()).square().mean() for output, target in pairs]
        loss = errors[0] / self.sizes[0] + errors[1] / self.sizes[1]
        self.optimizer.zero_grad()
        (loss * self.factor).backward()
        self.optimizer.step()
        self.schedule.step()
        return float(loss.detach())

    def state_dict(self) -> dict[str, Any]:
        parts = self.lora.state_dict(), self.optimizer.state_dict(), self.schedule.state_dict()
        return dict(zip(("lora", "optimizer", "schedule"), parts, strict=True))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, part in (("lora", self.lora), ("optimizer", self.optimizer), ("schedule", self.schedule)):
            part.load_state_dict(state[name])


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
