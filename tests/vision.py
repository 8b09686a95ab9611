"""Tiny random models that see: CLIP, DINO and CSD."""

from pathlib import Path

import tiny
import torch
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}


def clip_processor() -> CLIPImageProcessor:
    return CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


def save_models(folder: Path) -> dict[str, str]:
    """Save one model of each kind with its processor; return their folders by kind."""
    vision = {**SMALL, "intermediate_size": 32}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        text = tiny.text_config(16, 2).to_dict()
        CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).save_pretrained(
            folder / "clip"
        )
        CLIPVisionModelWithProjection(CLIPVisionConfig(**vision, projection_dim=12)).save_pretrained(folder / "csd")
        ViTModel(ViTConfig(**vision), add_pooling_layer=False).save_pretrained(folder / "dino")
    CLIPProcessor(clip_processor(), tiny.tokenizer()).save_pretrained(folder / "clip")
    clip_processor().save_pretrained(folder / "csd")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / "dino")
    return {name: str(folder / name) for name in ("clip", "dino", "csd")}
