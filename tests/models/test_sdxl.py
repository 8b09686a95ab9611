"""The full-size SDXL UNet on the meta device: both LoRAs injected, nothing allocated."""

import pytest
import sdxl
import torch
from diffusers import DDPMScheduler

from unziplora.config.recipe import resolve
from unziplora.config.split import SplitConfig
from unziplora.lora.blocks import SDXL_BLOCKS
from unziplora.lora.inject import adapted_layers
from unziplora.methods.adapters import TrainingData
from unziplora.methods.unziplora.method import UnZipLora
from unziplora.models.text import Conditioning
from unziplora.training.loss import Examples


@pytest.fixture(scope="module")
def method() -> UnZipLora:
    unet = sdxl.unet.__wrapped__().requires_grad_(False)  # not the cached one: this one is changed
    config = resolve(SplitConfig, {"images": ["x.png"], "content": "cat", "style": "ink", "out": "run", "rank": 64})
    nothing = torch.empty(1, device="meta")
    examples = Examples(nothing, Conditioning(nothing, nothing, nothing))
    return UnZipLora(unet, DDPMScheduler(), TrainingData(examples), config)


def test_sdxl_has_560_attention_linears_and_the_published_count_of_parameters(method):
    assert len(adapted_layers(method.unet)) == 560
    for name in ("content", "style"):
        branches = method.branches[name].values()
        assert len(branches) == 560
        assert sum(b.down.numel() + b.up.numel() for b in branches) == 92_897_280
    matrices = [p for group in method.parameter_groups()[:2] for p in group["params"]]
    assert sum(p.numel() for p in matrices) == 2 * 92_897_280
    assert all(p.requires_grad for p in matrices)
    trained = {id(p) for group in method.parameter_groups() for p in group["params"]}
    assert not any(p.requires_grad for p in method.unet.parameters() if id(p) not in trained)


def test_every_block_of_the_map_exists_in_sdxl(method):
    paths = list(adapted_layers(method.unet))
    counts = {
        block: sum(path.startswith(block + ".") for path in paths) for block in SDXL_BLOCKS.content + SDXL_BLOCKS.style
    }
    # ten transformer blocks of eight linears in each attention of up_blocks.0, two in up_blocks.1
    assert counts == {block: 80 if block.startswith("up_blocks.0") else 16 for block in counts}
    assert len(list(method.columns.held["content"])) == 560 - 160
    assert len(list(method.columns.held["style"])) == 560 - 80 - 48


def test_forward_pass_with_three_prompts_keeps_the_latents_shape(method):
    with torch.device("meta"):
        conditioning = {"text_embeds": torch.empty(1, 1280), "time_ids": torch.empty(1, 6)}
        tokens, latents = torch.empty(1, 77, 3 * 2048), torch.empty(1, 4, 128, 128)
        timesteps = torch.empty(1, dtype=torch.long)
    out = method.unet(latents, timesteps, tokens, added_cond_kwargs=conditioning).sample
    assert out.shape == (1, 4, 128, 128)
