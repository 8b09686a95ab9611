"""Batches of stage `unet`: images, prompts and timesteps of each step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from recipes.base.captions import STYLE_WORDS, draw_prompt, restyled
from recipes.base.config import UnetSettings
from recipes.base.dataset import Images
from recipes.base.text import token_ids
from recipes.base.world import Item, World
from unziplora.training.loss import towards_noise


class Pool:
    """Numbers of a group of images: those of each style, and those that answer prompts without a style."""

    def __init__(self, items: Sequence[Item], first: int = 0):
        numbered = list(enumerate(items, first))
        styles = sorted({item.style for item in items})
        self.by_style = [np.array([i for i, x in numbered if x.style == style]) for style in styles]
        self.natural = np.array([i for i, x in numbered if x.natural])

    def draw(self, kind: str, rng: np.random.Generator) -> int:
        """Draw the number of an image of a random style, or of a natural image if the prompt names no style."""
        numbers = self.natural if kind == "content" else self.by_style[int(rng.integers(len(self.by_style)))]
        return int(rng.choice(numbers))


@dataclass
class Blend:
    """Prompts of other styles, and the weight of each in the condition of its example, [N]."""

    prompts: list[str]
    weights: Tensor


class Deck:
    """Source of training examples: the kind of prompt is drawn first, then a style, then an image, plain or graded.

    The graded copy of image i has number N + i, and `papers[i]` names its paper. The recipe's own images come first.
    Those of all concepts follow and are drawn at the share `broad`.
    """

    def __init__(
        self,
        images: Images,
        world: World,
        settings: UnetSettings,
        papers: Sequence[str] = (),
        own: int | None = None,
    ):
        self.items, self.world = images.items, world
        self.papers, self.graded = papers, settings.graded if papers else 0.0
        self.kinds, shares = list(settings.kinds), np.array(list(settings.kinds.values()))
        self.shares = shares / shares.sum()
        self.own = Pool(self.items[:own])
        self.broad = Pool(self.items[own:], own) if own is not None and settings.broad else None
        self.broad_share = settings.broad

    def draw(self, count: int, rng: np.random.Generator) -> tuple[np.ndarray, list[str]]:
        """Draw indices of images and a prompt for each."""
        chosen, prompts = [], []
        for kind in rng.choice(self.kinds, count, p=self.shares):
            broad = self.broad if self.broad and rng.random() < self.broad_share else None
            index = (broad or self.own).draw(kind, rng)
            item, caption = self.items[index], self.world.caption(self.items[index].concept)
            paper = self.papers[index] if self.graded and rng.random() < self.graded else ""
            chosen.append(index + len(self.items) if paper else index)
            prompts.append(draw_prompt(kind, caption, item.style, rng, black=item.black, paper=paper))
        return np.array(chosen), prompts

    def blend(self, chosen: np.ndarray, prompts: list[str], share: float, rng: np.random.Generator) -> Blend:
        """Draw a prompt of another style for each, and how far to go there; at most a `share` of them do.

        The weight of the other style has the density 2 (1 − w): an image stands for what is between two styles as often
        as it is the nearer one.
        """
        words = sorted(word for style in {item.style for item in self.items} for word in STYLE_WORDS[style])
        others, weights = [], np.where(rng.random(len(prompts)) < share, 1 - np.sqrt(rng.random(len(prompts))), 0.0)
        for index, prompt in zip(chosen, prompts, strict=True):
            style = self.items[int(index) % len(self.items)].style
            others.append(restyled(prompt, style, words[int(rng.integers(len(words)))]))
        return Blend(others, torch.from_numpy(weights).float())


def timesteps(count: int, shift: float, rng: np.random.Generator) -> np.ndarray:
    """Draw timesteps in 0…999, [count], spread evenly; a shift above 1 prefers noisy ones (arXiv 2403.03206, eq. 23).

    One comes from each of `count` equal parts, so that the loss differs less from batch to batch (arXiv 2107.00630,
    appendix I.1).
    """
    parts = (rng.permutation(count) + rng.random(count)) / count
    return np.floor(towards_noise(parts, 1000, shift)).astype(np.int64)


@dataclass
class Batch:
    """Examples of one step.

    Attributes:
        indices: numbers of images, [N].
        timesteps: [N].
        mask: 0 for empty prompts whose conditions are zeros, as SDXL's may be at sampling, else 1; [N].
        prompts: N texts.
        blend: other styles that the conditions go towards, if any do.
        ids: token ids for both encoders, each [N, 77], or [2 N, 77] with those of the blend; only in batches that were
            drawn ahead.
    """

    indices: Tensor
    timesteps: Tensor
    mask: Tensor
    prompts: list[str]
    blend: Blend | None = None
    ids: tuple[Tensor, Tensor] | None = None

    @property
    def texts(self) -> list[str]:
        """All prompts to embed, those of the blend last."""
        return self.prompts + (self.blend.prompts if self.blend else [])


class Batches(Dataset[Batch]):
    """Batches of a run by step. Each depends on (seed, step) alone, so any process can draw it."""

    def __init__(self, deck: Deck, settings: UnetSettings, seed: int, tokenizers: Sequence[Any]):
        self.deck, self.settings, self.seed, self.tokenizers = deck, settings, seed, tokenizers
        self._ahead: Iterator[Batch] | None = None
        self._next = 0

    def __len__(self) -> int:
        return self.settings.steps

    def __getitem__(self, step: int) -> Batch:
        rng = np.random.default_rng((self.seed, step))
        chosen, prompts = self.deck.draw(self.settings.batch, rng)
        mask = [not (prompt == "" and rng.random() < 0.5) for prompt in prompts]
        t = timesteps(len(prompts), self.settings.timestep_shift, rng)
        batch = Batch(torch.from_numpy(chosen), torch.from_numpy(t), torch.tensor(mask).float(), prompts)
        if self.settings.blended:
            batch.blend = self.deck.blend(chosen, prompts, self.settings.blended, rng)
        if self.settings.workers:
            first, second = (token_ids(tokenizer, batch.texts) for tokenizer in self.tokenizers)
            batch.ids = (first, second)
        return batch

    def at(self, step: int) -> Batch:
        """Return the batch of a step; workers draw those of the following steps meanwhile."""
        if not self.settings.workers:
            return self[step]
        if self._ahead is None or step != self._next:
            self._ahead = iter(self._loader(step))
        self._next = step + 1
        return next(self._ahead)

    def _loader(self, first: int) -> DataLoader[Batch]:
        return DataLoader(
            self,
            batch_size=None,  # an item is a batch
            sampler=range(first, len(self)),
            num_workers=self.settings.workers,
            prefetch_factor=8,
        )
