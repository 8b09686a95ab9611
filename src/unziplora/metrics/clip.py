"""CLIP similarities of images to words (arXiv 2103.00020)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from unziplora.metrics.statistics import Images
from unziplora.metrics.vision_models import CLIP, load_vision_model

BATCH = 16


class Clip:
    """Similarities of an image to content words, and to style phrases, by a CLIP model (arXiv 2103.00020)."""

    def __init__(self, source: str, contents: Sequence[str], styles: Sequence[str], device: torch.device | str) -> None:
        """Load a model from a folder or the hub. Raises as `load_vision_model`."""
        self.model, self.processor = load_vision_model(CLIP, source)
        self.model.to(device)
        self.contents = [f"a picture of a {word}" for word in contents]
        self.styles = [f"a picture in {phrase} style" for phrase in styles]

    def content(self, images: Images) -> Tensor:
        """Return cosine similarities to the content words, [N, words], rows scaled to unit length."""
        return self._similarities(images, self.contents)

    def style(self, images: Images) -> Tensor:
        """Return cosine similarities to the style phrases, [N, phrases], rows scaled to unit length."""
        return self._similarities(images, self.styles)

    @torch.no_grad()
    def _similarities(self, images: Images, texts: list[str]) -> Tensor:
        rows = []
        for start in range(0, len(images), BATCH):
            batch = [image.convert("RGB") for image in images[start : start + BATCH]]
            inputs = self.processor(text=texts, images=batch, padding=True, truncation=True, return_tensors="pt")
            output = self.model(**inputs.to(self.model.device))  # its embeddings have unit length
            rows.append(output.image_embeds @ output.text_embeds.T)
        return F.normalize(torch.cat(rows).float().cpu(), dim=1)
