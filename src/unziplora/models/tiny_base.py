"""A tiny, untrained base of SDXL's topology: stands in where no base is at hand; its pictures are noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from unziplora.models.checkpoint import clip_tokenizer
from unziplora.utils.logging import quiet

SIDE = 64
WIDTHS = (32, 48)


def save_standin(folder: Path) -> Path:
    """Write the stand-in as a diffusers folder, about 15 MB; the caller's random state is left alone."""
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(0)
        pipe = StableDiffusionXLPipeline(
            vae=_vae(),
            text_encoder=CLIPTextModel(_text(WIDTHS[0])),
            text_encoder_2=CLIPTextModelWithProjection(_text(WIDTHS[1])),
            tokenizer=clip_tokenizer(),
            tokenizer_2=clip_tokenizer("!"),
            unet=_unet(),
            scheduler=EulerDiscreteScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                timestep_spacing="leading",
                steps_offset=1,
            ),
            add_watermarker=False,
        )
        pipe.save_pretrained(folder)
    return folder


def _text(width: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=4, projection_dim=width
    )


def _unet() -> UNet2DConditionModel:
    time = 16
    shape: dict[str, Any] = {
        "sample_size": SIDE // 8,
        "block_out_channels": (16, 32, 64),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 1, 2),
        "attention_head_dim": (1, 2, 4),
        "cross_attention_dim": sum(WIDTHS),
        "norm_num_groups": 8,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": time,
        "projection_class_embeddings_input_dim": 6 * time + WIDTHS[1],
    }
    return UNet2DConditionModel(**shape)


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        sample_size=SIDE,
        scaling_factor=0.13025,
    )
