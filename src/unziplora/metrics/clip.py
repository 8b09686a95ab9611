"""CLIP similarities of images to words (arXiv 2103.00020)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from unziplora.metrics.statistics import Pictures
from unziplora.metrics.vision_models import CLIP, open_vision


class Clip:
    """A CLIP model (arXiv 2103.00020): similarities of a picture to the content words, and to the style phrases.

    Attributes:
        model: a `CLIPModel` in fp32.
        processor: its `CLIPProcessor`.
    """

    def __init__(self, source: str, contents: Sequence[str], styles: Sequence[str], device: torch.device | str) -> None:
        """Load a model from a folder or the hub, safetensors only.

        Raises:
            UserError: there is no such model here or on the hub, it is damaged, or it is no CLIP model.
        """
        self.model, self.processor = open_vision(CLIP, source)
        self.model.to(device)
        self.contents = [f"a picture of a {word}" for word in contents]
        self.styles = [f"a picture in {phrase} style" for phrase in styles]

    def content(self, pictures: Pictures) -> Tensor:
        """Cosine similarities to the content words, [N, words], rows scaled to unit length."""
        return self._similarities(pictures, self.contents)

    def style(self, pictures: Pictures) -> Tensor:
        """Cosine similarities to the style phrases, [N, phrases], rows scaled to unit length."""
        return self._similarities(pictures, self.styles)

    @torch.no_grad()
    def _similarities(self, pictures: Pictures, texts: list[str]) -> Tensor:
        rows = []
        for start in range(0, len(pictures), 16):
            batch = [picture.convert("RGB") for picture in pictures[start : start + 16]]
            inputs = self.processor(text=texts, images=batch, padding=True, truncation=True, return_tensors="pt")
            made = self.model(**inputs.to(self.model.device))  # its embeddings have unit length
            rows.append(made.image_embeds @ made.text_embeds.T)
        return F.normalize(torch.cat(rows).float().cpu(), dim=1)
