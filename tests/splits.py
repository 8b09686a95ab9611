"""UnZipLoRA on the tiny base, for the tests of its method and of training."""

import torch
from diffusers import DDPMScheduler

from unziplora.config.recipe import resolve
from unziplora.config.split import SplitConfig
from unziplora.methods.adapters import TrainingData
from unziplora.methods.unziplora.method import UnZipLora
from unziplora.models.text import Conditioning
from unziplora.training.loss import Examples

TINY = {"rank": 2, "steps": 9, "column_periods": 3, "column_warmup": 1, "score_timesteps": 2, "checkpoint_every": 0}


def config(**changes: object) -> SplitConfig:
    words = {"images": ["cat.png"], "content": "cat", "style": "ink", "out": "run", "base": "tiny"}
    rates = {"content_learning_rate": 1e-2, "style_learning_rate": 1e-2}
    return resolve(SplitConfig, {**words, **TINY, **rates, **changes})


def examples(base, joined: bool = True, seed: int = 0) -> Examples:
    draw = torch.Generator().manual_seed(seed)
    unet = base.unet.config
    size = unet.sample_size
    width = unet.cross_attention_dim * (3 if joined else 1)
    pooled = base.unet.add_embedding.linear_1.in_features - 6 * unet.addition_time_embed_dim
    conditioning = Conditioning(
        torch.randn(1, 7, width, generator=draw),
        torch.randn(1, pooled, generator=draw),
        torch.tensor([[64.0, 64, 0, 0, 64, 64]]),
    )
    return Examples(torch.randn(1, unet.in_channels, size, size, generator=draw), conditioning)


def scheduler(base) -> DDPMScheduler:
    return DDPMScheduler.from_config(base.scheduler.config)


def build(base, **changes: object) -> UnZipLora:
    recipe = config(**changes)
    return UnZipLora(base.unet, scheduler(base), TrainingData(examples(base, recipe.prompt_separation)), recipe)
