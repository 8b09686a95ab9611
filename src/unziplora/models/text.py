"""Prompts and their conditioning: one prompt for all, or three that stay separate (arXiv 2412.04465, section 3.2)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from unziplora.errors import UserError
from unziplora.models.base import Base
from unziplora.utils.logging import quiet

TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]
ENCODERS = ("text_encoder", "text_encoder_2")


@dataclass(frozen=True)
class Prompts:
    """Prompts of an image: one for the base and all LoRAs, or one for the base and one for each of the two LoRAs."""

    full: str
    content: str | None = None
    style: str | None = None

    def __post_init__(self) -> None:
        for name, text in (("full", self.full), ("content", self.content), ("style", self.style)):
            if text is not None and not text.strip():
                raise UserError(f"the {name} prompt is empty: describe the image")
        if (self.content is None) != (self.style is None):
            raise UserError("three prompts go together: give both a content and a style prompt, or neither")

    @property
    def separate(self) -> bool:
        return self.content is not None


class ConditioningSource(Protocol):
    """Conditioning of N images, available row by row."""

    def take(self, index: Tensor) -> Conditioning:
        """Return the rows at these indices."""


@dataclass(frozen=True)
class Conditioning:
    """Conditioning of B images: prompts as the UNet sees them, and the images' sizes.

    Attributes:
        tokens: hidden states of both text encoders, [B, T, D], or of three prompts joined, [B, T, 3·D].
        pooled: pooled embedding of the full prompt by the second text encoder, [B, P].
        time_ids: original size, crop and target size in pixels, [B, 6]; None if only prompts are encoded.
    """

    tokens: Tensor
    pooled: Tensor
    time_ids: Tensor | None = None

    def take(self, index: Tensor) -> Conditioning:
        return self._map(lambda rows: rows[index])

    def repeat(self, count: int) -> Conditioning:
        """Repeat the rows for a batch of images."""
        return self._map(lambda rows: rows.repeat(count, *[1] * (rows.dim() - 1)))

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Conditioning:
        """Convert to another device and another number format."""
        return self._map(lambda rows: rows.to(device, dtype))

    def with_time_ids(self, ids: Tensor | None) -> Conditioning:
        return replace(self, time_ids=ids)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        sizes = None if self.time_ids is None else change(self.time_ids)
        return Conditioning(change(self.tokens), change(self.pooled), sizes)


@torch.no_grad()
def embed(base: Base, prompts: Sequence[str]) -> Conditioning:
    """Encode prompts exactly as diffusers' pipeline does, by text encoders on the base's device.

    Each prompt is encoded by itself, so that its embedding does not depend on its neighbors. A prompt
    longer than CLIP's 75 tokens causes a warning with the words that are not read.
    """
    for text in dict.fromkeys(prompts):
        _warn_if_unread(base, text)
    with quiet():
        return encode_each(base, prompts).to(base.device, base.dtype)


def encode_each(base: Base, prompts: Sequence[str]) -> Conditioning:
    """Encode prompts one by one, each once, by text encoders on the base's device; gradients flow through them."""
    rows = {text: encode_batch(base, [text]) for text in dict.fromkeys(prompts)}
    return Conditioning(
        torch.cat([rows[text].tokens for text in prompts]), torch.cat([rows[text].pooled for text in prompts])
    )


def encode_batch(base: Base, prompts: Sequence[str]) -> Conditioning:
    """Encode prompts in one batch, by text encoders on the base's device; gradients flow through them."""
    tokens, _, pooled, _ = base.pipe.encode_prompt(list(prompts), device=base.device, do_classifier_free_guidance=False)
    return Conditioning(tokens, pooled)


def embed_negative(base: Base, prompts: Sequence[str]) -> Conditioning:
    """Encode negative prompts; an empty one is zeros if the base was trained so (as SDXL was)."""
    rows = embed(base, prompts)
    if base.pipe.config.get("force_zeros_for_empty_prompt", True):
        nonempty = torch.tensor([bool(text.strip()) for text in prompts], device=base.device)
        return Conditioning(rows.tokens * nonempty[:, None, None], rows.pooled * nonempty[:, None])
    return rows


def join_streams(full: Tensor, content: Tensor, style: Tensor) -> Tensor:
    """Join three prompts' token embeddings on the feature axis, [B, T, D] each → [B, T, 3·D].

    The order is that of `STREAMS`; the adapted layers split them again (see `BranchedLinear`).
    """
    return torch.cat([full, content, style], dim=-1)


def embed_prompts(base: Base, prompts: Prompts) -> Conditioning:
    """Encode one image's prompts: one as it is, three joined; the pooled embedding is the full prompt's."""
    if not prompts.separate:
        return embed(base, [prompts.full])
    return join_rows(embed(base, [text or "" for text in (prompts.full, prompts.content, prompts.style)]))


def join_rows(rows: Conditioning) -> Conditioning:
    """Join the rows of three prompts into one: all tokens, and the first prompt's pooled embedding."""
    return Conditioning(join_streams(*rows.tokens.split(1)), rows.pooled[:1])


def image_conditioning(base: Base, prompts: Prompts, sizes: Tensor) -> Conditioning:
    """Encode the prompts that images with these sizes, [N, 6], share."""
    return embed_prompts(base, prompts).repeat(len(sizes)).with_time_ids(sizes)


def time_ids(width: int, height: int, count: int = 1) -> Tensor:
    """Return SDXL's size conditioning for uncropped images: original size, crop, target size, in pixels, [B, 6]."""
    return torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32).repeat(count, 1)


def unread_end(base: Base, text: str) -> str:
    """Return the end of a prompt that CLIP does not read, because it reads at most 75 tokens."""
    tokenizer = base.tokenizers[0]
    ids = tokenizer(text, verbose=False).input_ids
    return tokenizer.decode(ids[tokenizer.model_max_length - 1 : -1])


def _warn_if_unread(base: Base, text: str) -> None:
    if unread := unread_end(base, text):
        limit = base.tokenizers[0].model_max_length - 2
        warnings.warn(f"prompt {text[:40]!r}…: CLIP reads {limit} tokens; not read: {unread!r}", stacklevel=4)
