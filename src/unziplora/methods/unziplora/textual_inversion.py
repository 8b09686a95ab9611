"""Textual inversion of a phrase: learned offsets to its token embeddings in both text encoders (arXiv 2208.01618).

An offset may be a mixture of the directions to words that the base knows (`phrase_words`). A base that knows few words
draws nothing sensible from an embedding outside of all such mixtures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from unziplora.errors import UserError
from unziplora.models.base import Base


class PhraseOffsets:
    """Learned offsets to the embeddings of a phrase's tokens, in both text encoders, one set for each image variant.

    Attributes:
        base: the base of the text encoders.
        token_ids: the phrase's tokens, per text encoder.
        learned: one parameter per text encoder: the offsets, [variants, tokens of the phrase, D], or with known words
            the share of each of their K tokens in the mixture, [variants, tokens of the phrase, K].
    """

    def __init__(self, base: Base, text: str, variants: int = 1, known_words: Sequence[str] = ()) -> None:
        """Start at the phrase as the base knows it: all offsets are zero.

        Raises:
            UserError: the phrase is longer than a prompt.
        """
        self.base = base
        self.token_ids = [tokenizer(text, add_special_tokens=False).input_ids for tokenizer in base.tokenizers]
        room = min(tokenizer.model_max_length for tokenizer in base.tokenizers) - 2  # start and end
        if (count := max(map(len, self.token_ids))) > room:
            raise UserError(f"style {text[:40]!r}… is {count} tokens long, and a prompt has {room}; shorten it")
        self.learned: list[nn.Parameter] = []
        self._directions: list[Tensor] = []  # from the phrase's tokens to the known words', [tokens, K, D]
        for tokenizer, encoder, ids in zip(base.tokenizers, base.text_encoders, self.token_ids, strict=True):
            table, width = token_embeddings(encoder).weight.detach(), token_embeddings(encoder).embedding_dim
            if known_words:
                words = [tokenizer(word, add_special_tokens=False).input_ids for word in known_words]
                known = sorted({token for tokens in words for token in tokens})
                self._directions.append((table[known].float()[None] - table[ids].float()[:, None]).to(base.device))
                width = len(known)
            self.learned.append(nn.Parameter(torch.zeros(variants, len(ids), width, device=base.device)))

    @property
    def variants(self) -> int:
        """Number of image variants."""
        return len(self.learned[0])

    @property
    def is_mixture(self) -> bool:
        """Whether the phrase is a mixture of known words."""
        return bool(self._directions)

    def values(self) -> list[Tensor]:
        """Return the offsets per text encoder, [variants, tokens of the phrase, D]."""
        if not self.is_mixture:
            return list(self.learned)
        pairs = zip(self.learned, self._directions, strict=True)
        return [torch.einsum("rtk,tkd->rtd", shares, directions) for shares, directions in pairs]

    @torch.no_grad()
    def keep_mixture(self) -> None:
        """Bring shares back to those of a mixture: none negative, their sum at most 1; the rest is the phrase's own.

        Embeddings outside of all mixtures can mean anything to a base, noise on the whole image for example, and
        subjects dissolve in it.
        """
        if self.is_mixture:
            for shares in self.learned:
                shares.clamp_(min=0)
                shares.div_(shares.sum(-1, keepdim=True).clamp(min=1))

    def occur_in(self, prompt: str) -> bool:
        """Test whether the offsets change a prompt: it contains all of the phrase's tokens in a row."""
        for tokenizer, ids in zip(self.base.tokenizers, self.token_ids, strict=True):
            tokens = tokenizer(prompt, padding="max_length", truncation=True, return_tensors="pt").input_ids
            if _phrase_starts(tokens, ids).any():
                return True
        return False

    @contextmanager
    def applied(self, variants: Tensor | None = None) -> Iterator[None]:
        """Temporarily add the offsets wherever the phrase occurs in a prompt.

        Args:
            variants: variant of each of B prompts that are encoded together, [B]; default: the first.
        """
        index = torch.zeros(1, dtype=torch.long) if variants is None else variants
        hooks = [
            token_embeddings(encoder).register_forward_hook(_offset_hook(ids, values[index]))
            for encoder, ids, values in zip(self.base.text_encoders, self.token_ids, self.values(), strict=True)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def token_embeddings(encoder: PreTrainedModel) -> nn.Embedding:
    """Return the token embeddings of a text encoder."""
    return encoder.get_input_embeddings()


def _phrase_starts(tokens: Tensor, ids: Sequence[int]) -> Tensor:
    """Mark where the phrase begins in [B, T], bool [B, T − tokens of the phrase + 1]."""
    return (tokens.unfold(1, len(ids), 1) == torch.tensor(ids, device=tokens.device)).all(-1)


def _offset_hook(ids: Sequence[int], offsets: Tensor) -> Callable[..., Tensor]:
    """Return a hook of the token embeddings that adds offsets to [B, T, D] where the phrase occurs in [B, T].

    Args:
        offsets: [B or 1, tokens of the phrase, D].
    """

    def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        tokens, length = inputs[0], len(ids)
        starts = _phrase_starts(tokens, ids)
        for number in range(length):
            here = F.pad(starts, (number, length - 1 - number))
            output = output + here[..., None] * offsets[:, number : number + 1].to(output.dtype)
        return output

    return add
