"""Sizes of a base from its configuration alone, for memory estimates and LoRA shapes."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from pydantic import BaseModel

from unziplora.config.bases import BUNDLED_BASE, is_bundled
from unziplora.lora.inject import TARGETS, target_layers
from unziplora.models.base import BUNDLED, Scale, described, latent_side
from unziplora.models.folder import PARTS, check_folder, read_config, usable_config
from unziplora.models.hub import names_a_model, no_such_base
from unziplora.models.text import TARGETS as TEXT_TARGETS
from unziplora.utils.logging import quiet

FULL_SIZE = BUNDLED / "sdxl"
"""Configuration of SDXL itself, without weights."""
MOST_LAYERS = 200
"""Largest number of layers of a part; SDXL has 32 in its second text encoder."""


class Sizes(BaseModel):
    """Sizes of a base that decide how much memory it needs; of `unet`, `vae` and `text` the number of parameters.

    Attributes:
        assumed: the base is not on this machine, and these are SDXL's sizes.
        resolution: the base's own, in pixels.
        text_features: sum of the in and out features of all q, k, v, out layers of the text encoders.
        layers: (in, out) of every layer of the UNet that a LoRA can adapt, by module path; of a convolution
            (in · kh · kw, out).
    """

    source: str
    assumed: bool
    resolution: int
    unet: int
    vae: int
    text: int
    text_features: int
    layers: dict[str, tuple[int, int]]
    unet_config: dict[str, Any]

    @property
    def latent_scale(self) -> int:
        return self.resolution // latent_side(self.unet_config)

    @property
    def names(self) -> list[str]:
        return list(self.layers)

    def adapter(self, rank: int, paths: Iterable[str]) -> int:
        """Count the parameters of one LoRA: A [r, in] and B [out, r] of the layers at these paths."""
        return rank * sum(sum(self.layers[path]) for path in paths)


def inspect_base(source: str) -> Sizes:
    """Determine the sizes of a base from its configuration; no weights are read, nothing is downloaded.

    Raises:
        UserError: no such base, or its configuration is damaged.
    """
    with usable_config(source):
        return _inspect_folder(source, base_folder(source))


def _inspect_folder(source: str, folder: Path | None) -> Sizes:
    assumed, folder = folder is None, folder or FULL_SIZE
    index = read_config(folder / "model_index.json")
    with torch.device("meta"), quiet():
        parts = {name: build_part(folder, name, index) for name in PARTS}
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    unet = parts["unet"]
    layers = {path: unet.get_submodule(path) for path in target_layers(unet, TARGETS)}
    scale = 2 ** (len(parts["vae"].config.block_out_channels) - 1)
    return Sizes(
        source=source,
        assumed=assumed,
        resolution=latent_side(unet.config) * scale,
        unet=counts["unet"],
        vae=counts["vae"],
        text=counts["text_encoder"] + counts["text_encoder_2"],
        text_features=sum(
            module.in_features + module.out_features
            for part in (parts["text_encoder"], parts["text_encoder_2"])
            for path, module in part.named_modules()
            if path.rpartition(".")[2] in TEXT_TARGETS
        ),
        layers={path: (layer.weight[0].numel(), layer.weight.shape[0]) for path, layer in layers.items()},
        unet_config={key: value for key, value in unet.config.items() if not key.startswith("_")},
    )


def described_unet(source: str) -> UNet2DConditionModel | None:
    """Build a base's UNet without weights, on the meta device; return None if the base must be downloaded first.

    Raises:
        UserError: as `inspect_base`.
    """
    with usable_config(source):
        folder = base_folder(source)
        if folder is None:
            return None
        with torch.device("meta"), quiet():
            return build_part(folder, "unet", read_config(folder / "model_index.json"))


def scale_of(source: str) -> Scale:
    """Read a base's resolution from its configuration; SDXL's if it must be downloaded first.

    Raises:
        UserError: as `base_folder`.
    """
    folder = base_folder(source) or FULL_SIZE
    vae, unet = (read_config(folder / part / "config.json") for part in ("vae", "unet"))
    with usable_config(source):
        blocks = vae.get("block_out_channels") or vae.get("decoder_block_out_channels") or range(4)
        latent = 2 ** (len(blocks) - 1)
        return Scale(latent_side({"sample_size": None, **unet}) * latent, latent)


def must_be_downloaded(source: str) -> bool:
    """Check whether a base is a model of the hub that is not on this machine yet."""
    return names_a_model(source) and not Path(source).exists() and _downloaded(source) is None


def base_folder(source: str) -> Path | None:
    """Return the folder with a base's configuration, or None if the base must be downloaded first.

    Raises:
        UserError: no such base, or it is of another family, or a part is missing.
    """
    path = BUNDLED_BASE if is_bundled(source) else Path(source).expanduser()
    if path.is_dir():
        check_folder(path, half=True)
        return path
    if path.is_file():
        return described(path)[0]
    if not is_bundled(source) and names_a_model(source):
        return _downloaded(source)
    raise no_such_base(source)


def stored_bytes(source: str) -> int | None:
    """Return the bytes of a base's weights on the disk, or None if the base must be downloaded first.

    Raises:
        UserError: as `base_folder`.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return path.stat().st_size
    folder = base_folder(source)
    return None if folder is None else sum(file.stat().st_size for file in folder.glob("*/*.safetensors"))


def _downloaded(source: str) -> Path | None:
    """Return the folder of a hub model that was downloaded before."""
    from huggingface_hub import try_to_load_from_cache

    parts = ("model_index.json", *(f"{part}/config.json" for part in PARTS))
    paths = [try_to_load_from_cache(source, part) for part in parts]
    return Path(paths[0]).parent if all(isinstance(path, str) for path in paths) and paths[0] else None


def build_part(folder: Path, name: str, index: dict[str, Any]) -> Any:
    """Build one model of a base from its configuration, on torch's current default device."""
    library, kind = index[name]
    if library not in ("diffusers", "transformers"):
        raise ValueError(f"{name} is a class of {library!r}")
    config = read_config(folder / name / "config.json")
    if most := [key for key, value in config.items() if "layers" in key and _largest(value) > MOST_LAYERS]:
        raise ValueError(f"{name} has more than {MOST_LAYERS} {most[0]}")
    model = getattr(import_module(library), kind)
    return model.from_config(config) if library == "diffusers" else model(model.config_class(**config))


def _largest(value: Any) -> int:
    """Return the largest number of a configuration's value: a number, or lists of them."""
    if isinstance(value, list):
        return max(map(_largest, value), default=0)
    return value if isinstance(value, int) else 0
