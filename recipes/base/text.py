"""Text encoders of SDXL's classes and conventions, and the conditions that they make of prompts."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from recipes.base.config import ClipSettings
from recipes.base.tokenizer import MAX_LENGTH


def build_encoder(
    settings: ClipSettings, which: int, tokenizer: CLIPTokenizer
) -> CLIPTextModel | CLIPTextModelWithProjection:
    """Return the untrained text encoder 0 (no projection) or 1 (with projection, pooled)."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.widths[which],
        intermediate_size=4 * settings.widths[which],
        num_hidden_layers=settings.layers[which],
        num_attention_heads=settings.heads[which],
        max_position_embeddings=MAX_LENGTH,
        projection_dim=settings.embedding,
        hidden_act="quick_gelu" if which == 0 else "gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModel, CLIPTextModelWithProjection)[which](config)


def token_ids(tokenizer: CLIPTokenizer, prompts: list[str], length: int = MAX_LENGTH) -> Tensor:
    """Return token ids [N, length], padded and truncated."""
    batch = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return batch.input_ids


@dataclass
class TextEncoders:
    """Tokenizers and encoders; `encode` returns the conditions of the UNet."""

    tokenizers: tuple[CLIPTokenizer, CLIPTokenizer]
    encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection]
    cache: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    cache_limit: int = 12_000

    @classmethod
    def load(cls, folder: Path, device: torch.device) -> TextEncoders:
        """Read `tokenizer`, `tokenizer_2`, `text_encoder`, `text_encoder_2` of a pipeline folder."""
        tokenizers = tuple(CLIPTokenizer.from_pretrained(folder / f"tokenizer{n}") for n in ("", "_2"))
        encoders = (
            CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32),
            CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2", dtype=torch.float32),
        )
        return cls(tokenizers, tuple(e.to(device).eval().requires_grad_(False) for e in encoders))

    def save(self, folder: Path) -> None:
        """Write the folders that `load` reads."""
        for n, tokenizer, encoder in zip(("", "_2"), self.tokenizers, self.encoders, strict=True):
            tokenizer.save_pretrained(folder / f"tokenizer{n}")
            encoder.save_pretrained(folder / f"text_encoder{n}")

    def ids(self, prompts: list[str], which: int, length: int = MAX_LENGTH) -> Tensor:
        """Return token ids [N, length] on the encoder's device."""
        return token_ids(self.tokenizers[which], prompts, length).to(self.encoders[which].device)

    @torch.no_grad()
    def encode_ids(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Encode token ids [N, 77] of both tokenizers as `encode` does, uncached, in the current precision."""
        outputs = [
            encoder(ids.to(encoder.device), output_hidden_states=True)
            for encoder, ids in zip(self.encoders, (first, second), strict=True)
        ]
        hidden = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        return hidden, outputs[1].text_embeds

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Return both encoders' penultimate hidden states [N, 77, D1 + D2] and the pooled output [N, P], float32."""
        missing = sorted(set(prompts) - self.cache.keys())
        if len(self.cache) + len(missing) > self.cache_limit:
            self.cache.clear()
            missing = sorted(set(prompts))
        if missing:
            hidden, pooled = self.encode_ids(self.ids(missing, 0), self.ids(missing, 1))
            pairs = zip(hidden.to(torch.bfloat16), pooled.float(), strict=True)
            self.cache.update(zip(missing, pairs, strict=True))
        rows = [self.cache[prompt] for prompt in prompts]
        return torch.stack([h for h, _ in rows]).float(), torch.stack([p for _, p in rows])
