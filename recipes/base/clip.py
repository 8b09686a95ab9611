"""Stage `clip`: contrastive training of both text encoders with a small image encoder, as for SDXL's own."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.base.captions import Kind, draw_prompt
from recipes.base.config import Recipe
from recipes.base.dataset import training_images
from recipes.base.loop import Log, Stage
from recipes.base.optimizers import adamw
from recipes.base.text import TextEncoders, build_encoder
from recipes.base.tokenizer import build_tokenizer, read_merges
from recipes.base.vae import broad_images, to_tensor
from recipes.base.world import Item, World

KINDS: tuple[Kind, ...] = ("full", "content", "style")
SHARES = (0.6, 0.25, 0.15)
LENGTH = 32
"""Tokens per prompt in this stage. The encoders are causal, so tokens after the end change nothing."""


class ImageEncoder(nn.Sequential):
    """Encoder of images [N, 3, R, R] as directions [N, D]: four strided stages and a mean.

    Images larger than `LARGEST` are averaged down to it: their content is as plain, at a quarter of the cost.
    """

    LARGEST = 64

    def __init__(self, width: int, out: int):
        layers: list[nn.Module] = []
        before = 3
        for channels in (width, 2 * width, 4 * width, 8 * width):
            layers += [nn.Conv2d(before, channels, 3, 2, 1), nn.GroupNorm(8, channels), nn.SiLU()]
            layers += [nn.Conv2d(channels, channels, 3, 1, 1), nn.GroupNorm(8, channels), nn.SiLU()]
            before = channels
        super().__init__(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * before, out))

    def forward(self, images: Tensor) -> Tensor:
        """Return the directions of images."""
        if images.shape[-1] > self.LARGEST:
            images = F.interpolate(images, (self.LARGEST, self.LARGEST), mode="area")
        return super().forward(images)


def matches(items: list[Item], kinds: list[Kind]) -> Tensor:
    """Return a mask, bool [N, N], of which prompt i is true of image j."""
    concepts = np.array([item.concept for item in items])
    styles = np.array([item.style for item in items])
    same_concept, same_style = concepts[:, None] == concepts, styles[:, None] == styles
    about_concept = np.array([kind != "style" for kind in kinds])[:, None]
    about_style = np.array([kind != "content" for kind in kinds])[:, None]
    return torch.from_numpy((same_concept | ~about_concept) & (same_style | ~about_style))


def contrastive_loss(texts: Tensor, images: Tensor, true: Tensor, scale: Tensor) -> tuple[Tensor, float]:
    """Compute CLIP's loss with several true images per text, and the share of texts whose best image is true."""
    logits = scale.exp() * F.normalize(texts.float(), dim=-1) @ F.normalize(images.float(), dim=-1).T
    weight = true.float()
    rows = -(weight / weight.sum(1, keepdim=True) * logits.log_softmax(1)).sum(1).mean()
    columns = -(weight / weight.sum(0, keepdim=True) * logits.log_softmax(0)).sum(0).mean()
    right = true[torch.arange(len(true)), logits.argmax(1)].float().mean().item()
    return (rows + columns) / 2, right


class ClipStage(Stage):
    """Contrastive training on prompts with content and style, content alone and style alone."""

    name = "clip"

    def __init__(self, recipe: Recipe):
        super().__init__(recipe)
        s = self.settings = recipe.clip
        torch.manual_seed(recipe.seed)
        merges = read_merges(s.merges)
        tokenizers = (build_tokenizer(merges), build_tokenizer(merges, pad_token="!"))
        encoders = tuple(build_encoder(s, i, tokenizers[i]).to(self.device) for i in (0, 1))
        self.text = TextEncoders(tokenizers, encoders)
        self.modules = {
            "text_encoder": encoders[0],
            "text_encoder_2": encoders[1],
            "head": nn.Linear(s.widths[0], s.embedding).to(self.device),
            "pictures": ImageEncoder(24, s.embedding).to(self.device, memory_format=torch.channels_last),
            "scale": nn.ParameterList([torch.tensor(math.log(10.0), device=self.device)]),
        }
        self.optimizer = adamw(self.modules, s.lr, weight_decay=0.05)
        self.own = len(training_images(recipe))
        self.images = broad_images(recipe)
        self.world = World(recipe.world)

    def choose(self, rng: np.random.Generator) -> np.ndarray:
        """Draw the indices of a batch: the recipe's own images, which come first, at least at the share `own`."""
        count, everything = self.settings.batch, len(self.images)
        own = rng.integers(0, self.own, count)
        return np.where(rng.random(count) < self.settings.own, own, rng.integers(0, everything, count))

    def prompts(self, items: list[Item], kinds: list[Kind], rng: np.random.Generator) -> list[str]:
        """Draw a random wording of each image's caption."""
        return [
            draw_prompt(kind, self.world.caption(item.concept), item.style, rng, black=item.black)
            for item, kind in zip(items, kinds, strict=True)
        ]

    def pooled(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Return both encoders' embeddings of prompts in the common space, each [N, D]."""
        first = self.text.encoders[0](self.text.ids(prompts, 0, LENGTH)).pooler_output
        second = self.text.encoders[1](self.text.ids(prompts, 1, LENGTH)).text_embeds
        return self.modules["head"](first), second

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        rng = self.draw(step)
        chosen = self.choose(rng)
        items = [self.images.items[i] for i in chosen]
        kinds = [KINDS[k] for k in rng.choice(3, len(items), p=SHARES)]
        true = matches(items, kinds).to(self.device)
        pixels = to_tensor(self.images.pixels[chosen], self.device)
        shown = self.modules["pictures"](pixels.contiguous(memory_format=torch.channels_last))
        scale = self.modules["scale"][0].clamp(max=math.log(50))
        prompts = self.prompts(items, kinds, rng)
        parts = [contrastive_loss(texts, shown, true, scale) for texts in self.pooled(prompts)]
        figures = {f"loss{n}": loss.item() for n, (loss, _) in enumerate(parts, 1)}
        figures |= {f"right{n}": right for n, (_, right) in enumerate(parts, 1)}
        return parts[0][0] + parts[1][0], figures

    def finish(self) -> None:
        """Save tokenizers and text encoders in the layout of a pipeline."""
        self.text.save(self.folder)
        Log(self.folder).write(stage="clip", saved=str(self.folder))
