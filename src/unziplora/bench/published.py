"""For real pictures without a truth: CLIP-I, DINO and CSD, with models that the user names.

Each is the mean cosine of image embeddings over all pairs of a made and a given picture, as in DreamBooth
(arXiv 2208.12242, section 4.2): CLIP's image embedding (arXiv 2103.00020), the class token of DINO
(arXiv 2104.14294, 2304.07193), and the style embedding of CSD (arXiv 2404.01292).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from unziplora.errors import UserError, first_line
from unziplora.probe_measures import load_clip
from unziplora.quiet import quiet

Pictures = Sequence[Image.Image]
Kind = Literal["clip", "dino", "csd"]
DINO_MODELS = ("vit", "dinov2", "dinov2_with_registers", "dinov3_vit")
NEEDED = {
    "dino": "a DINO, DINOv2 or DINOv3 vision transformer in .safetensors with its image processor",
    "csd": "a CLIPVisionModelWithProjection in .safetensors with its image processor, whose visual projection is the "
    "style projection of CSD (the transpose of `last_layer_style` in the published checkpoint)",
}
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
            model, processor = load_clip(source)
            self._processor = processor.image_processor
            self._embed: Callable[[Tensor], Tensor] = lambda pixels: model.visual_projection(
                model.vision_model(pixel_values=pixels).pooler_output
            )
        elif kind == "csd":
            model, self._processor = _load(kind, source, "CLIPVisionModelWithProjection", ("clip_vision_model",))
            self._embed = lambda pixels: model(pixel_values=pixels).image_embeds
        else:
            model, self._processor = _load(kind, source, "AutoModel", DINO_MODELS)
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

    def similarity(self, made: Pictures, given: Pictures) -> float:
        """Mean cosine over all pairs of a made and a given picture, in −1…1.

        Raises:
            UserError: one of the lists is empty.
        """
        if not made or not given:
            raise UserError(f"--{self.kind}: needs at least one made and one given picture")
        return (self.embed(made) @ self.embed(given).T).mean().item()


def _load(kind: Kind, source: str, name: str, types: tuple[str, ...]) -> tuple[Any, Any]:
    """A model of one of the types, complete, and its image processor."""
    import transformers

    path = Path(source).expanduser()
    place: dict[str, Any] = {"local_files_only": True} if path.is_dir() else {}
    where = str(path) if path.is_dir() else source
    try:
        with quiet():
            found = transformers.AutoConfig.from_pretrained(where, **place).model_type
            if found not in types:
                raise UserError(f"--{kind} {source}: this is a {found} model; give {NEEDED[kind]}")
            extra = {"add_pooling_layer": False} if found == "vit" else {}  # DINO has no pooling layer
            model, about = getattr(transformers, name).from_pretrained(
                where, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **extra, **place
            )
            if missing := sorted(about["missing_keys"]):
                raise UserError(
                    f"--{kind} {source}: {missing[0]} is not in its weights, so its embeddings would be random; "
                    f"give {NEEDED[kind]}"
                )
            processor = transformers.AutoImageProcessor.from_pretrained(where, **place)
    except UserError:
        raise
    except Exception as error:  # each library on the way has errors of its own
        raise UserError(
            f"--{kind} {source}: no model can be loaded from here ({first_line(error)}). Give the folder, or while "
            f"online the hub id, of {NEEDED[kind]}; or leave --{kind} out"
        ) from error
    return model.eval().requires_grad_(False), processor
