"""CSD's checkpoint, converted: the embeddings of OpenAI's network, written down here once more."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from recipes.bench import csd
from unziplora.errors import UserError
from unziplora.metrics.embedders import ImageModel

WIDTH, HEADS, LAYERS, PATCH, GRID, OUT = 128, 2, 2, 4, 3, 6


@pytest.fixture
def checkpoint() -> dict[str, Tensor]:
    """Random weights in the names of the published file."""
    torch.manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {
        "class_embedding": (WIDTH,),
        "positional_embedding": (GRID**2 + 1, WIDTH),
        "conv1.weight": (WIDTH, 3, PATCH, PATCH),
        **{f"{norm}.{part}": (WIDTH,) for norm in ("ln_pre", "ln_post") for part in ("weight", "bias")},
    }
    for layer in range(LAYERS):
        own: dict[str, tuple[int, ...]] = {
            "attn.in_proj_weight": (3 * WIDTH, WIDTH),
            "attn.in_proj_bias": (3 * WIDTH,),
            "attn.out_proj.weight": (WIDTH, WIDTH),
            "attn.out_proj.bias": (WIDTH,),
            "mlp.c_fc.weight": (4 * WIDTH, WIDTH),
            "mlp.c_fc.bias": (4 * WIDTH,),
            "mlp.c_proj.weight": (WIDTH, 4 * WIDTH),
            "mlp.c_proj.bias": (WIDTH,),
            **{f"ln_{n}.{part}": (WIDTH,) for n in (1, 2) for part in ("weight", "bias")},
        }
        shapes |= {f"transformer.resblocks.{layer}.{name}": shape for name, shape in own.items()}
    backbone = {f"module.backbone.{name}": torch.randn(shape) / 8 for name, shape in shapes.items()}
    heads = {f"module.last_layer_{name}": torch.randn(WIDTH, OUT) for name in ("style", "content")}
    return {**backbone, **heads}


def openai(weights: dict[str, Tensor], images: Tensor) -> Tensor:
    """The style embedding of images [N, 3, S, S] by OpenAI's vision transformer with CSD's projection."""
    w = {name.removeprefix("module.").removeprefix("backbone."): tensor for name, tensor in weights.items()}
    x = F.conv2d(images, w["conv1.weight"], stride=PATCH).flatten(2).transpose(1, 2)
    x = torch.cat([w["class_embedding"].expand(len(x), 1, -1), x], 1) + w["positional_embedding"]
    x = F.layer_norm(x, (WIDTH,), w["ln_pre.weight"], w["ln_pre.bias"])
    for layer in range(LAYERS):
        own = {n.split(".", 3)[3]: t for n, t in w.items() if n.startswith(f"transformer.resblocks.{layer}.")}
        attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        attention.load_state_dict({n.removeprefix("attn."): t for n, t in own.items() if n.startswith("attn.")})
        y = F.layer_norm(x, (WIDTH,), own["ln_1.weight"], own["ln_1.bias"])
        x = x + attention(y, y, y, need_weights=False)[0]
        y = F.layer_norm(x, (WIDTH,), own["ln_2.weight"], own["ln_2.bias"])
        y = F.linear(y, own["mlp.c_fc.weight"], own["mlp.c_fc.bias"])
        x = x + F.linear(y * torch.sigmoid(1.702 * y), own["mlp.c_proj.weight"], own["mlp.c_proj.bias"])
    x = F.layer_norm(x[:, 0], (WIDTH,), w["ln_post.weight"], w["ln_post.bias"])
    return x @ w["last_layer_style"]


@torch.no_grad()
def test_converted_folder_gives_the_same_style_embeddings(
    checkpoint: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"model_state_dict": checkpoint, "args": argparse.Namespace(lr=1.0)}, tmp_path / "checkpoint.pth")
    monkeypatch.setattr(sys, "argv", ["csd", str(tmp_path / "checkpoint.pth"), str(tmp_path / "csd")])
    csd.main()
    image = Image.effect_mandelbrot((GRID * PATCH, GRID * PATCH), (-2, -1.5, 1, 1.5), 20).convert("RGB")
    model = ImageModel("csd", str(tmp_path / "csd"))
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(GRID * PATCH, GRID * PATCH, 3)
    mean, spread = torch.tensor([0.4815, 0.4578, 0.4082]), torch.tensor([0.2686, 0.2613, 0.2758])  # CLIP's
    expected = openai(checkpoint, ((pixels / 255 - mean) / spread).permute(2, 0, 1)[None])
    torch.testing.assert_close(model.embed([image]), F.normalize(expected, dim=1), rtol=1e-3, atol=1e-3)


def test_other_checkpoints_are_refused(checkpoint: dict[str, Tensor]) -> None:
    with pytest.raises(UserError, match="lacks last_layer_style"):
        csd.convert({name: t for name, t in checkpoint.items() if "style" not in name})
    with pytest.raises(UserError, match="extra is unknown"):
        csd.convert({**checkpoint, "module.backbone.extra": torch.ones(1)})
    del checkpoint["module.backbone.ln_post.bias"]
    with pytest.raises(UserError, match=r"post_layernorm\.bias"):
        csd.convert(checkpoint)
