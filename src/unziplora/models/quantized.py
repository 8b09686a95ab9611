"""Bases with weights in ComfyUI's scaled fp8: the scales, which diffusers ignores, and their application."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline
from safetensors import safe_open
from torch import nn

from unziplora.errors import UserError, faults_of
from unziplora.formats.names import parse_name
from unziplora.formats.quantization import find_scales, rescaled
from unziplora.formats.safetensors import Header
from unziplora.formats.sdxl import LAYERS


def scaled_weights(
    path: Path, header: Header, part: str | None = None, layers: int = LAYERS
) -> dict[tuple[str, str], str]:
    """Return the scaled modules of a file, (part of the pipeline, path) → name of the scale.

    Args:
        path: of the file, for messages.
        header: its header.
        part: the part whose weights these are in diffusers' names; None for a checkpoint in the original layout.
        layers: resnets per down block of the UNet, for the original layout.

    Raises:
        UserError: the file is quantized in another way, or its VAE is.
    """
    with faults_of(path):
        scales = find_scales(header.shapes, header.dtypes)
    modules = {name.removesuffix(".weight"): scale for name, scale in scales.items()}
    if part:
        return {(part, name): scale for name, scale in modules.items()}
    try:
        return {parse_name(name, layers)[:2]: scale for name, scale in modules.items()}
    except ValueError as error:
        raise UserError(
            f"{path}: a scaled weight outside UNet and text encoders ({error}); take the file in fp16, bf16 or fp32"
        ) from None


@torch.no_grad()
def rescale(pipe: StableDiffusionXLPipeline, path: Path, header: Header, part: str | None = None) -> None:
    """Multiply the weights that a pipeline has read from a file by their scales; most files have none."""
    scales = scaled_weights(path, header, part, pipe.unet.config.layers_per_block)
    with safe_open(path, "pt") as file:
        for (owner, name), scale in scales.items():
            weight = _weight(getattr(pipe, owner), name)
            weight.copy_(rescaled(weight, file.get_tensor(scale)))


def _weight(model: nn.Module, name: str) -> nn.Parameter:
    try:
        return model.get_parameter(f"{name}.weight")
    except AttributeError:  # transformers 5 has no level `text_model.`
        return model.get_parameter(f"{name.removeprefix('text_model.')}.weight")
