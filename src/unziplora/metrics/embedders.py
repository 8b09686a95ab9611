"""For real pictures without a truth: CLIP-I, DINO and CSD, with models that the user names.

Each is the mean cosine of image embeddings over all pairs of a made and a given picture, as in DreamBooth
(arXiv 2208.12242, section 4.2): CLIP's image embedding (arXiv 2103.00020), the class token of DINO
(arXiv 2104.14294, 2304.07193), and the style embedding of CSD (arXiv 2404.01292).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from unziplora.metrics.vision_models import CLIP, Wanted, open_vision

Pictures = Sequence[Image.Image]
Kind = Literal["clip", "dino", "csd"]
DINO = Wanted(
    "--dino",
    "AutoModel",
    "AutoImageProcessor",
    ("vit", "dinov2", "dinov2_with_registers", "dinov3_vit"),
    "a DINO, DINOv2 or DINOv3 vision transformer in .safetensors with its image processor",
)
CSD = Wanted(
    "--csd",
    "CLIPVisionModelWithProjection",
    "AutoImageProcessor",
    ("clip_vision_model",),
    "a CLIPVisionModelWithProjection in .safetensors with its image processor, whose visual projection is the style "
    "projection of CSD (the transpose of `last_layer_style` in the published checkpoint)",
)
BATCH = 16


class ImageModel:
    """A vision model as one embedding per picture.

    Attributes:
        kind: `clip`, `dino` or `csd`.
        source: the folder or hub id that it came from.
    """

    def __init__(self, kind: Kind, source: str, device: torch.device | str = "cpu") -> None:
        """Load a model from a folder or the hub, safetensors only.

        Raises:
            UserError: there is no such model here or on the hub, it is damaged, or it is of another kind.
        """
        self.kind, self.source, self._device = kind, source, device
        if kind == "clip":
            model, processor = open_vision(CLIP, source)
            self._processor = processor.image_processor
            self._embed: Callable[[Tensor], Tensor] = lambda pixels: model.visual_projection(
                model.vision_model(pixel_values=pixels).pooler_output
            )
        elif kind == "csd":
            model, self._processor = open_vision(CSD, source)
            self._embed = lambda pixels: model(pixel_values=pixels).image_embeds
        else:
            model, self._processor = open_vision(DINO, source)
            self._embed = lambda pixels: model(pixel_values=pixels).last_hidden_state[:, 0]
        model.to(device)

    @torch.no_grad()
    def embed(self, pictures: Pictures) -> Tensor:
        """Embeddings [N, D], rows of unit length, on the CPU."""
        rows = []
        for start in range(0, len(pictures), BATCH):
            batch = [picture.convert("RGB") for picture in pictures[start : start + BATCH]]
            pixels = self._processor(images=batch, return_tensors="pt")["pixel_values"]
            rows.append(self._embed(pixels.to(self._device)).float().cpu())
        return F.normalize(torch.cat(rows), dim=1)
