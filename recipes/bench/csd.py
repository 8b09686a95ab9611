"""The published checkpoint of CSD as a folder for ``--csd``: ``python -m recipes.bench.csd CHECKPOINT.pth FOLDER``.

CSD (arXiv 2404.01292, github.com/learn2phoenix/CSD) is CLIP's vision transformer in OpenAI's names, with a projection
for the style in place of CLIP's own.
"""

from __future__ import annotations

import argparse
import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from recipes import run
from unziplora.errors import UserError

PROJECTION = "last_layer_style"
_HEAD = 64
"""Width of an attention head in all of OpenAI's vision transformers."""

_NAMES = {  # OpenAI's names → those of transformers
    r"class_embedding": "embeddings.class_embedding",
    r"conv1\.weight": "embeddings.patch_embedding.weight",
    r"positional_embedding": "embeddings.position_embedding.weight",
    r"ln_pre\.(\w+)": r"pre_layrnorm.\1",
    r"ln_post\.(\w+)": r"post_layernorm.\1",
    r"transformer\.resblocks\.(\d+)\.attn\.out_proj\.(\w+)": r"encoder.layers.\1.self_attn.out_proj.\2",
    r"transformer\.resblocks\.(\d+)\.ln_(\d)\.(\w+)": r"encoder.layers.\1.layer_norm\2.\3",
    r"transformer\.resblocks\.(\d+)\.mlp\.c_fc\.(\w+)": r"encoder.layers.\1.mlp.fc1.\2",
    r"transformer\.resblocks\.(\d+)\.mlp\.c_proj\.(\w+)": r"encoder.layers.\1.mlp.fc2.\2",
}
_FUSED = re.compile(r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)")


def convert(checkpoint: Mapping[str, Tensor]) -> CLIPVisionModelWithProjection:
    """Return the style model of a checkpoint's tensors by name.

    Raises:
        UserError: it is not CSD's: a tensor is missing, or has another name or shape.
    """
    tensors = {name.removeprefix("module."): tensor.float() for name, tensor in checkpoint.items()}
    if PROJECTION not in tensors or "backbone.conv1.weight" not in tensors:
        raise UserError(f"this is no checkpoint of CSD: it lacks {PROJECTION} or backbone.conv1.weight")
    vision = {name.removeprefix("backbone."): t for name, t in tensors.items() if name.startswith("backbone.")}
    state = {"visual_projection.weight": tensors[PROJECTION].T.contiguous()}
    for name, tensor in vision.items():
        if match := _FUSED.fullmatch(name):
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                state[f"vision_model.encoder.layers.{match[1]}.self_attn.{letter}_proj.{match[2]}"] = part
        else:
            state[f"vision_model.{_renamed(name)}"] = tensor
    model = CLIPVisionModelWithProjection(_config(vision, tensors[PROJECTION].shape[1]))
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"this is no checkpoint of CSD: {error}") from None
    return model.eval()


def _renamed(name: str) -> str:
    for pattern, target in _NAMES.items():
        if match := re.fullmatch(pattern, name):
            return match.expand(target)
    raise UserError(f"this is no checkpoint of CSD: {name} is unknown")


def _config(vision: Mapping[str, Tensor], projection: int) -> CLIPVisionConfig:
    """Return the configuration that the shapes tell."""
    width, _, patch, _ = vision["conv1.weight"].shape
    side = round((len(vision["positional_embedding"]) - 1) ** 0.5)
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=len(vision["transformer.resblocks.0.mlp.c_fc.weight"]),
        projection_dim=projection,
        num_hidden_layers=len([name for name in vision if name.endswith(".ln_1.weight")]),
        num_attention_heads=max(1, width // _HEAD),
        image_size=side * patch,
        patch_size=patch,
        hidden_act="quick_gelu",
    )


def read(checkpoint: Path) -> Mapping[str, Tensor]:
    """Return the tensors of a pickled checkpoint by name; no code from it is run.

    Raises:
        UserError: the file is missing, or contains more than tensors and settings.
    """
    if not checkpoint.is_file():
        raise UserError(f"{checkpoint}: no such file")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the settings of a training; data only
            stored = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError):
        raise UserError(f"{checkpoint}: not a checkpoint of tensors; download CSD's published file again") from None
    tensors = stored.get("model_state_dict", stored) if isinstance(stored, dict) else {}
    return {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)}


def main() -> None:
    """Write the model and its image processor."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    model = convert(read(options.checkpoint))
    model.save_pretrained(options.folder, safe_serialization=True)
    side = model.config.image_size
    size = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    CLIPImageProcessor(**size).save_pretrained(options.folder)


if __name__ == "__main__":
    run(main)
