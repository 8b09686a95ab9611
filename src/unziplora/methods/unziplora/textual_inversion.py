"""A phrase whose embeddings are learned, in both text encoders (textual inversion, arXiv 2208.01618).

Most of the way may go along words of styles that the base knows (`phrase_words`): far from all of them it does not
understand what it is told.
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


class Phrase:
    """What a phrase's tokens have learned: offsets to their embeddings, in both text encoders, in several readings.

    Attributes:
        free: the part of the offsets that goes anywhere, one parameter per text encoder,
            [readings, tokens of the phrase, D].
        shares: the part that goes along known words, how much of the way to each of their K tokens,
            [readings, tokens of the phrase, K].
    """

    def __init__(self, base: Base, text: str, readings: int = 1, known: Sequence[str] = ()) -> None:
        """Start at the phrase as the base knows it, without any offset.

        Raises:
            UserError: no prompt can hold the phrase.
        """
        self.base = base
        self.ids = [tokenizer(text, add_special_tokens=False).input_ids for tokenizer in base.tokenizers]
        room = min(tokenizer.model_max_length for tokenizer in base.tokenizers) - 2  # start and end
        if (count := max(map(len, self.ids))) > room:
            raise UserError(f"style {text[:40]!r}…: {count} tokens long, {room} at most: say it shorter")
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
    def applied(self, readings: Tensor | None = None) -> Iterator[None]:
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


def embeddings(encoder: PreTrainedModel) -> nn.Embedding:
    """The token embeddings of a text encoder."""
    return encoder.get_input_embeddings()


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
