"""Prompts and their embeddings: one for all, or three that stay separate (arXiv 2412.04465, section 3.2)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from unziplora.errors import UserError
from unziplora.models.base import Base
from unziplora.models.offload import text_encoders_ready
from unziplora.utils.logging import quiet

TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]
ENCODERS = ("text_encoder", "text_encoder_2")


@dataclass(frozen=True)
class Prompts:
    """What a picture shall show: one prompt, or that and what each of the two LoRAs shall see of it.

    Attributes:
        full: seen by the frozen base, and by every LoRA where the other two are not given.
        content: seen by the content LoRA.
        style: seen by the style LoRA.
    """

    full: str
    content: str | None = None
    style: str | None = None

    def __post_init__(self) -> None:
        for name, text in (("full", self.full), ("content", self.content), ("style", self.style)):
            if text is not None and not text.strip():
                raise UserError(f"the {name} prompt is empty: say what the picture shall show")
        if (self.content is None) != (self.style is None):
            raise UserError("three prompts go together: give both a content and a style prompt, or neither")

    @property
    def separate(self) -> bool:
        """Whether the LoRAs see prompts of their own."""
        return self.content is not None


@dataclass(frozen=True)
class Embeddings:
    """Text embeddings of B prompts.

    Attributes:
        tokens: hidden states of both text encoders, [B, T, D], or three streams joined, [B, T, 3·D].
        pooled: pooled embedding of the second text encoder, [B, P].
    """

    tokens: Tensor
    pooled: Tensor

    def repeat(self, count: int) -> Embeddings:
        """The rows repeated, for a batch of pictures."""
        return Embeddings(self.tokens.repeat(count, 1, 1), self.pooled.repeat(count, 1))

    def with_time_ids(self, ids: Tensor) -> Conditioning:
        """All that the UNet is told, with the size conditioning [B, 6] of the pictures."""
        return Conditioning(self.tokens, self.pooled, ids)


@torch.no_grad()
def embed(base: Base, prompts: Sequence[str]) -> Embeddings:
    """Encode prompts exactly as diffusers' pipeline does, on the UNet's device, [B, T, D] and [B, P].

    Each prompt is encoded by itself, so that its embedding does not depend on its neighbors. A prompt
    longer than CLIP's 75 tokens is warned about, with the words that are cut.
    """
    for text in dict.fromkeys(prompts):
        _warn_if_cut(base, text)
    with text_encoders_ready(base), quiet():
        rows = encode_each(base, prompts)
    return Embeddings(rows.tokens.to(base.dtype), rows.pooled.to(base.dtype))


def encode_each(base: Base, prompts: Sequence[str]) -> Embeddings:
    """Encode prompts one by one, each once, by text encoders that are on the device; gradients flow through them."""
    rows = {text: encode_batch(base, [text]) for text in dict.fromkeys(prompts)}
    return Embeddings(
        torch.cat([rows[text].tokens for text in prompts]), torch.cat([rows[text].pooled for text in prompts])
    )


def encode_batch(base: Base, prompts: Sequence[str]) -> Embeddings:
    """Encode prompts in one batch, by text encoders that are on the device; gradients flow through them."""
    tokens, _, pooled, _ = base.pipe.encode_prompt(list(prompts), device=base.device, do_classifier_free_guidance=False)
    return Embeddings(tokens, pooled)


def embed_negative(base: Base, prompts: Sequence[str]) -> Embeddings:
    """Encode negative prompts; an empty one is zeros where the base was trained so (as SDXL was)."""
    embeddings = embed(base, prompts)
    if base.pipe.config.get("force_zeros_for_empty_prompt", True):
        kept = torch.tensor([bool(text.strip()) for text in prompts], device=base.device)
        return Embeddings(embeddings.tokens * kept[:, None, None], embeddings.pooled * kept[:, None])
    return embeddings


def join_streams(full: Tensor, content: Tensor, style: Tensor) -> Tensor:
    """Join three prompts' token embeddings on the feature axis, [B, T, D] each → [B, T, 3·D].

    The order is that of `STREAMS`; the adapted layers split them again (see `BranchedLinear`).
    """
    return torch.cat([full, content, style], dim=-1)


def embed_prompts(base: Base, prompts: Prompts) -> Embeddings:
    """The embeddings of one picture's prompts: plain, or three joined where the LoRAs see their own.

    The pooled embedding is the full prompt's.
    """
    if not prompts.separate:
        return embed(base, [prompts.full])
    return join_rows(embed(base, [text or "" for text in (prompts.full, prompts.content, prompts.style)]))


def join_rows(streams: Embeddings) -> Embeddings:
    """Three prompts' embeddings as one row: tokens joined, pooled of the first."""
    return Embeddings(join_streams(*streams.tokens.split(1)), streams.pooled[:1])


def time_ids(width: int, height: int, count: int = 1) -> Tensor:
    """SDXL's size conditioning for uncropped pictures: original size, crop, target size, in pixels, [B, 6]."""
    return torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32).repeat(count, 1)


def cut(base: Base, text: str) -> str:
    """The end of a prompt that CLIP does not read, because it reads 75 tokens at most."""
    tokenizer = base.tokenizers[0]
    ids = tokenizer(text, verbose=False).input_ids
    return tokenizer.decode(ids[tokenizer.model_max_length - 1 : -1])


def _warn_if_cut(base: Base, text: str) -> None:
    if lost := cut(base, text):
        limit = base.tokenizers[0].model_max_length - 2
        warnings.warn(f"prompt {text[:40]!r}…: CLIP reads {limit} tokens; not read: {lost!r}", stacklevel=4)


class ConditioningSource(Protocol):
    """The conditioning of pictures, as far as a step asks for it."""

    def take(self, index: Tensor) -> Conditioning:
        """The rows at these indices."""


@dataclass(frozen=True)
class Conditioning:
    """What the UNet is told about B pictures.

    Attributes:
        tokens: token embeddings [B, T, D], or three joined on the feature axis [B, T, 3·D].
        pooled: pooled embedding of the full prompt, [B, P].
        time_ids: original size, crop and target size, [B, 6].
    """

    tokens: Tensor
    pooled: Tensor
    time_ids: Tensor

    def take(self, index: Tensor) -> Conditioning:
        """The rows at these indices."""
        return Conditioning(self.tokens[index], self.pooled[index], self.time_ids[index])

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Conditioning:
        """The same on another device and in another number format."""
        return Conditioning(*(x.to(device, dtype) for x in (self.tokens, self.pooled, self.time_ids)))


def image_conditioning(base: Base, prompts: Prompts, resolution: int, count: int) -> Conditioning:
    """Conditioning of `count` uncropped square pictures of a side in pixels that share the prompts."""
    return embed_prompts(base, prompts).repeat(count).with_time_ids(time_ids(resolution, resolution, count))
