"""SDXL's own UNet without weights, and the recorded names of its modules."""

import gzip
from functools import cache
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

CONFIG = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


@cache
def unet() -> UNet2DConditionModel:
    """The full-size UNet on the meta device: every module and shape, no memory."""
    with torch.device("meta"):
        return UNet2DConditionModel(**CONFIG)


@cache
def recorded() -> list[tuple[str, str, tuple[int, int]]]:
    """kohya's name, diffusers' path and weight shape of the 722 linear modules of SDXL's transformers.

    Recorded with InvokeAI's map of SDXL's names (sdxl_lora_conversion_utils.py), which knows nothing of ours.
    """
    text = gzip.decompress((Path(__file__).parent / "data" / "sdxl_modules.txt.gz").read_bytes()).decode()
    lines = [line.split() for line in text.splitlines()]
    return [(kohya, path, tuple(map(int, shape.split("x")))) for kohya, path, shape in lines]
