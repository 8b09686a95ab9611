"""The style phrase first: its embeddings are learnt, then a LoRA of the text encoders makes them of the plain words.

Textual inversion (arXiv 2208.01618) of the phrase with everything else frozen says as much of the style as words can.
LoRAs that learn the picture told so need not say it again (pivotal tuning, arXiv 2106.05744). Most of the way may go
along words of styles that the base knows (`phrase_words`): far from all of them it does not understand what it is told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from unziplora.base import Base
from unziplora.encode import encode_pictures, to_device
from unziplora.images import to_tensor
from unziplora.methods.common import Setup
from unziplora.objective import Conditioning, Examples, denoising_loss, generator
from unziplora.optim import make_schedule
from unziplora.prompts import join, together, visiting
from unziplora.text_lora import TextLora
from unziplora.variants import filtered

if TYPE_CHECKING:
    from unziplora.config_split import SplitConfig

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

TEACHING_STEPS, TEACHING_BATCH, TEACHING_RATE = 100, 12, 4e-3
LOSS_SCALE = 1024.0
"""Keeps fp16 gradients from underflow; Adam's steps do not depend on it."""


class Phrase:
    """What a phrase's tokens have learnt: offsets to their embeddings, in both text encoders, in several readings.

    Attributes:
        free: the part of the offsets that goes anywhere, one parameter per text encoder,
            [readings, tokens of the phrase, D].
        shares: the part that goes along known words, how much of the way to each of their K tokens,
            [readings, tokens of the phrase, K].
    """

    def __init__(self, base: Base, text: str, readings: int = 1, known: Sequence[str] = ()) -> None:
        """Start at the phrase as the base knows it, without any offset."""
        self.base = base
        self.ids = [tokenizer(text, add_special_tokens=False).input_ids for tokenizer in base.tokenizers]
        self.free, self.shares, self._ways = [], [], []
        for tokenizer, encoder, ids in zip(base.tokenizers, base.text_encoders, self.ids, strict=True):
            table = embeddings(encoder).weight.detach()
            tokens = sorted({token for word in known for token in tokenizer(word, add_special_tokens=False).input_ids})
            self._ways.append((table[tokens].float()[None] - table[ids].float()[:, None]).to(base.device))
            self.free.append(nn.Parameter(torch.zeros(readings, len(ids), table.shape[1], device=base.device)))
            self.shares.append(nn.Parameter(torch.zeros(readings, len(ids), len(tokens), device=base.device)))

    @property
    def readings(self) -> int:
        """How many readings there are."""
        return len(self.free[0])

    def offsets(self) -> list[Tensor]:
        """What is added to the tokens' embeddings, per text encoder [readings, tokens of the phrase, D]."""
        return [
            free + torch.einsum("rtk,tkd->rtd", shares, ways)
            for free, shares, ways in zip(self.free, self.shares, self._ways, strict=True)
        ]

    def occurs_in(self, prompt: str) -> bool:
        """Whether the offsets change this prompt: all of the phrase's tokens occur in it, one after the other."""
        for tokenizer, ids in zip(self.base.tokenizers, self.ids, strict=True):
            tokens = tokenizer(prompt, padding="max_length", truncation=True, return_tensors="pt").input_ids
            if _starts(tokens, ids).any():
                return True
        return False

    @contextmanager
    def spoken(self, readings: Tensor | None = None) -> Iterator[None]:
        """Add the offsets wherever the phrase occurs in a prompt, for a while.

        Args:
            readings: which to take for each of B prompts that are encoded together, [B]; default: the first.
        """
        taken = torch.zeros(1, dtype=torch.long) if readings is None else readings
        hooks = [
            embeddings(encoder).register_forward_hook(_adding(ids, offsets[taken]))
            for encoder, ids, offsets in zip(self.base.text_encoders, self.ids, self.offsets(), strict=True)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def embeddings(encoder: nn.Module) -> nn.Embedding:
    """The token embeddings of a text encoder."""
    found: Any = encoder
    return found.get_input_embeddings()


def _starts(tokens: Tensor, ids: Sequence[int]) -> Tensor:
    """Where the phrase begins in [B, T], bool [B, T − tokens of the phrase + 1]."""
    return (tokens.unfold(1, len(ids), 1) == torch.tensor(ids, device=tokens.device)).all(-1)


def _adding(ids: Sequence[int], offsets: Tensor) -> Callable[..., Tensor]:
    """A hook of the token embeddings that finds the phrase, token after token, in [B, T] and adds to [B, T, D].

    Args:
        offsets: [B or 1, tokens of the phrase, D].
    """

    def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        tokens, length = inputs[0], len(ids)
        starts = _starts(tokens, ids)
        for number in range(length):
            here = F.pad(starts, (number, length - 1 - number))
            output = output + here[..., None] * offsets[:, number : number + 1].to(output.dtype)
        return output

    return add


def learn_words(
    setup: Setup, config: SplitConfig, pictures: Sequence[Image.Image], examples: Examples
) -> tuple[TextLora, Examples | None]:
    """Learn the style's phrase and leave it in the text encoders; a resumed run learns it anew, to the same end.

    Args:
        setup: the base, without LoRAs; its VAE leaves the device.
        config: the recipe.
        pictures: what is learnt from.
        examples: the same, encoded.

    Returns:
        The text encoders' LoRA, and the pictures with their variants for the content LoRA, if the recipe asks for them.
    """
    setup.tell(f"learning the phrase {config.style!r}")
    if config.content_variants:
        examples = _with_variants(setup.base, pictures, examples)
    setup.leave_unet_alone(config, text=True)
    phrase = Phrase(setup.base, config.style, len(examples.latents) // len(pictures), config.phrase_words)
    with visiting(setup.base.text_encoders, setup.base.device):
        prompt = config.fill("a {content} in {style} style")
        learn_phrase(phrase, setup.noise_schedule(), examples, prompt, config, setup.autocast)
        variants = to_device(retold(phrase, examples, config), setup.base) if config.content_variants else None
        return teach_encoders(phrase, config), variants


def _with_variants(base: Base, pictures: Sequence[Image.Image], examples: Examples) -> Examples:
    """The pictures, then all of them under the first filter, the second …; told as the pictures are."""
    by_filter = zip(*(filtered(picture)[1:] for picture in pictures), strict=True)
    more = encode_pictures(base, [to_tensor(picture) for row in by_filter for picture in row])
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
    for step in range(config.phrase_steps):
        draw = generator(config.seed, "phrase", step)
        index = _drawn(phrase, len(examples.latents), config.batch_size, draw)
        with phrase.spoken(index * phrase.readings // len(examples.latents)), autocast():
            rows = together(phrase.base, [prompt] * len(index))
            ids = examples.conditioning.time_ids[index]
            weights = None if examples.weights is None else examples.weights[index]
            told = Examples(examples.latents[index], Conditioning(rows.tokens, rows.pooled, ids), weights)
            loss = denoising_loss(phrase.base.unet, scheduler, told, draw=draw, **config.noising())
        optimizer.zero_grad()
        (loss * LOSS_SCALE).backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def retold(phrase: Phrase, examples: Examples, config: SplitConfig) -> Examples:
    """The pictures with the full prompt in their own readings, as all LoRAs shall see it."""
    count = len(examples.latents)
    with phrase.spoken(torch.arange(count) * phrase.readings // count):
        rows = together(phrase.base, [config.prompts()["full"]] * count)
    tokens = join(*[rows.tokens] * 3) if config.prompt_separation else rows.tokens
    return replace(examples, conditioning=Conditioning(tokens, rows.pooled, examples.conditioning.time_ids))


def _drawn(phrase: Phrase, pictures: int, count: int, draw: torch.Generator) -> Tensor:
    """Pictures to learn from in one step, about `FIRST` of them of the first reading, the style itself, [count]."""
    first = torch.randint(pictures // phrase.readings, (count,), generator=draw)
    any_reading = torch.randint(pictures, (count,), generator=draw)
    return torch.where(torch.rand(count, generator=draw) < FIRST, first, any_reading)


def teach_encoders(phrase: Phrase, config: SplitConfig) -> TextLora:
    """Put a LoRA into the text encoders that makes of the plain phrase what `phrase` has learnt.

    It learns from prompts alone: those with the phrase shall be embedded as with the offsets, all others as without.

    Args:
        phrase: learnt.
        config: the recipe; its words, rank and seed.
    """
    base, prompts = phrase.base, config.prompts()
    styled = [config.fill(f"a {thing} in {{style}} style") for thing in THINGS]
    said = list(
        dict.fromkeys([prompts["full"], prompts["style"], config.fill("a {content} in {style} style"), *styled])
    )
    own = [config.fill("a {token} {content} in ") + f"{style} style" for style in STYLES]
    others = [f"a {thing} in {style} style" for thing, style in zip(THINGS, STYLES, strict=False)]
    plain_ones = [prompts["content"], config.fill("a {content}"), "an image", *(f"a {thing}" for thing in THINGS)]
    # The phrase may be one of STYLES: no prompt can be embedded both ways.
    kept = [text for text in (*plain_ones, *own, *others) if not phrase.occurs_in(text)]
    with torch.no_grad():
        plain, kept_rows = together(base, said), together(base, kept)
        with phrase.spoken():
            goal = together(base, said)
    tokens, pooled = torch.cat([goal.tokens, kept_rows.tokens]), torch.cat([goal.pooled, kept_rows.pooled])
    sizes = [
        (a.float() - b.float()).square().mean().clamp(min=1e-8)
        for a, b in ((goal.tokens, plain.tokens), (goal.pooled, plain.pooled))
    ]
    adapter, texts = TextLora(base, config), said + kept
    optimizer = torch.optim.Adam(adapter.parameters(), lr=TEACHING_RATE)
    slowing = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, TEACHING_STEPS)
    for step in range(TEACHING_STEPS):
        index = torch.randperm(len(texts), generator=generator(config.seed, "teach", step))[:TEACHING_BATCH].tolist()
        rows = together(base, [texts[number] for number in index])
        pairs = (rows.tokens, tokens[index]), (rows.pooled, pooled[index])
        errors = [(made.float() - wanted.float()).square().mean() for made, wanted in pairs]
        optimizer.zero_grad()
        (errors[0] / sizes[0] + errors[1] / sizes[1]).backward()
        optimizer.step()
        slowing.step()
    return adapter
