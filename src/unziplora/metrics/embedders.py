"""Embedders for photos: CLIP-I, DINO and CSD, with models that the user names.

Each compares images by the mean cosine of their embeddings over all pairs of a generated and a real image, as in
DreamBooth (arXiv 2208.12242, section 4.2). The embeddings are CLIP's image embedding (arXiv 2103.00020), the class
token of DINO (arXiv 2104.14294, 2304.07193), and the style embedding of CSD (arXiv 2404.01292).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from unziplora.metrics.statistics import Images
from unziplora.metrics.vision_models import CLIP, VisionModelSpec, load_vision_model

Kind = Literal["clip", "dino", "csd"]
DINO = VisionModelSpec(
    "--dino",
    "AutoModel",
    "AutoImageProcessor",
    ("vit", "dinov2", "dinov2_with_registers", "dinov3_vit"),
    "a DINO, DINOv2 or DINOv3 vision transformer in .safetensors with its image processor (DINOv3's needs torchvision)",
)
CSD = VisionModelSpec(
    "--csd",
    "CLIPVisionModelWithProjection",
    "AutoImageProcessor",
    ("clip_vision_model",),
    "a CLIPVisionModelWithProjection in .safetensors with its image processor, whose visual projection is the style "
    "projection of CSD; python -m recipes.bench.csd makes one of the published checkpoint",
)
BATCH = 16


class ImageModel:
    """Vision model that returns one embedding per image."""

    def __init__(self, kind: Kind, source: str, device: torch.device | str = "cpu") -> None:
        """Load a model from a folder or the hub. Raises as `load_vision_model`."""
        self.kind, self._device = kind, device
        if kind == "clip":
            model, processor = load_vision_model(CLIP, source)
            self._processor = processor.image_processor
            self._embed: Callable[[Tensor], Tensor] = lambda pixels: model.visual_projection(
                model.vision_model(pixel_values=pixels).pooler_output
            )
        elif kind == "csd":
            model, self._processor = load_vision_model(CSD, source)
            self._embed = lambda pixels: model(pixel_values=pixels).image_embeds
        else:
            model, self._processor = load_vision_model(DINO, source)
            self._embed = lambda pixels: model(pixel_values=pixels).last_hidden_state[:, 0]
        self._model = model.to(device)
        self._fingerprint = ""

    def to(self, device: torch.device | str) -> None:
        """Move the model."""
        self._model.to(device)
        self._device = device

    def fingerprint(self) -> str:
        """Return the type of the model and 16 hex digits of a hash of its weights and of how images are prepared."""
        if not self._fingerprint:
            digest = hashlib.sha256(json.dumps(self._processor.to_dict(), sort_keys=True, default=str).encode())
            for name, tensor in self._model.state_dict().items():
                digest.update(f"{name} {tuple(tensor.shape)}".encode() + tensor.cpu().numpy().tobytes())
            self._fingerprint = f"{self._model.config.model_type} {digest.hexdigest()[:16]}"
        return self._fingerprint

    @torch.no_grad()
    def embed(self, images: Images) -> Tensor:
        """Return embeddings [N, D], rows of unit length, on the CPU."""
        rows = []
        for start in range(0, len(images), BATCH):
            batch = [image.convert("RGB") for image in images[start : start + BATCH]]
            pixels = self._processor(images=batch, return_tensors="pt")["pixel_values"]
            rows.append(self._embed(pixels.to(self._device)).float().cpu())
        return F.normalize(torch.cat(rows), dim=1)


@dataclass
class ModelMeasure:
    """Two image models as a measure."""

    name: str
    contents: ImageModel
    styles: ImageModel

    @property
    def weights_hash(self) -> str:
        """Mark of the models, so that others under the same name score again."""
        return hashlib.sha256((self.contents.fingerprint() + self.styles.fingerprint()).encode()).hexdigest()[:16]

    @contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        """Temporarily move the models to a device; while a run trains, they must not take its memory."""
        models = (self.contents, self.styles)
        try:
            for model in models:
                model.to(device)
            yield
        finally:
            for model in models:
                model.to("cpu")

    def content(self, images: Images) -> Tensor:
        """Embed the content, [N, D], rows of unit length."""
        return self.contents.embed(images)

    concept = content

    def style(self, images: Images) -> Tensor:
        """Embed the style, [N, D], rows of unit length."""
        return self.styles.embed(images)
