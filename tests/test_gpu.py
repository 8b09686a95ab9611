"""What only a CUDA device can show: `pytest -m gpu`."""

import json
import warnings

import pytest
import torch
from PIL import Image

from unziplora.config.split import SplitConfig
from unziplora.formats.files import read_lora
from unziplora.methods.unziplora.method import split
from unziplora.models.base import load_base

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_split_trains_both_loras_on_cuda(tiny_folder, tmp_path, precision, checkpointing):
    picture = tmp_path / "cat.png"
    Image.effect_mandelbrot((64, 64), (-2, -1.5, 1, 1.5), 20).convert("RGB").save(picture)
    config = SplitConfig(
        images=[picture],
        content="cat",
        style="ink",
        out=tmp_path / "run",
        base=str(tiny_folder),
        rank=2,
        steps=9,
        column_warmup=1,
        precision=precision,
        gradient_checkpointing=checkpointing,
        sample_steps=2,
        sample_seeds=[0],
        device="cuda",
    )
    run = split(config)
    for path in (run.content, run.style):
        ups = [up for _, up in read_lora(path).modules.values()]
        assert all(up.isfinite().all() for up in ups)
        assert any(up.abs().max() > 0 for up in ups)
    assert run.sheets[-1].stat().st_size > 0


def test_the_same_weights_predict_the_same_on_cpu_and_cuda(tiny_folder):
    draw = torch.Generator().manual_seed(0)
    outputs = []
    for device in ("cpu", "cuda"):
        unet = load_base(str(tiny_folder), torch.float32, device).unet
        config = unet.config
        draw.manual_seed(0)
        given = {
            "text_embeds": torch.randn(
                1, config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim, generator=draw
            ).to(device),
            "time_ids": torch.full((1, 6), 64.0, device=device),
        }
        latents = torch.randn(1, config.in_channels, 8, 8, generator=draw).to(device)
        tokens = torch.randn(1, 7, config.cross_attention_dim, generator=draw).to(device)
        with torch.no_grad():
            outputs.append(unet(latents, 500, tokens, added_cond_kwargs=given).sample.cpu())
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_recorded_steps_learn_the_same(tiny_folder, tmp_path, precision):
    picture = tmp_path / "cat.png"
    Image.effect_mandelbrot((64, 64), (-2, -1.5, 1, 1.5), 20).convert("RGB").save(picture)
    words = {"images": [picture], "content": "cat", "style": "ink", "base": str(tiny_folder), "device": "cuda"}
    short = {"rank": 2, "steps": 16, "column_warmup": 4, "column_periods": 2, "sample_seeds": [], "phrase_steps": 6}
    rates = {"content_learning_rate": 1e-3, "style_learning_rate": 1e-3, "content_alone": 0.2, "style_alone": 0.2}
    losses = []
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the steps are not recorded")
        for recorded in (False, True):
            config = SplitConfig(
                **words, **short, **rates, out=tmp_path / str(recorded), precision=precision, cuda_graphs=recorded
            )
            lines = split(config).log_file.read_text().splitlines()
            losses.append([json.loads(line)["loss"] for line in lines if "loss" in line])
    assert len(losses[0]) == 16
    torch.testing.assert_close(losses[0], losses[1], rtol=0.02 if precision != "fp32" else 1e-3, atol=0)
