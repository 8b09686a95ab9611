"""Small LoRA files in every layout, for the tests of readers and writers."""

from functools import cache

import tiny
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from unziplora.formats.names import to_kohya
from unziplora.lora.algebra import delta
from unziplora.lora.inject import attention_linears
from unziplora.lora.weights import Lora

Q = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


TEXT = "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj"


@cache
def tiny_unet():
    return tiny.unet()


def make(paths=None, rank=2, seed=0, unet=None):
    """A LoRA for some modules of the tiny UNet, with random factors; `rank` may depend on the path's index."""
    unet = unet or tiny_unet()
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for index, path in enumerate(paths or attention_linears(unet)):
        out, *inner = unet.get_submodule(path).weight.shape
        r = rank(index) if callable(rank) else rank
        ones = [1] * len(inner[1:])
        down = torch.randn(r, *inner, generator=generator)
        modules[path] = (down, torch.randn(out, r, *ones, generator=generator))
    return Lora(modules)


def every_kind(unet):
    """One path of every kind of module: attention, feed-forward, projections, convolutions, embeddings."""
    seen = {}
    for name, module in unet.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            seen.setdefault((name.split(".")[0], name.rsplit(".", 2)[-1], type(module)), name)
    return list(seen.values())


def same(left, right, **tolerance):
    assert left.modules.keys() == right.modules.keys()
    for path, pair in left.modules.items():
        torch.testing.assert_close(delta(right.modules[path]), delta(pair), **tolerance)


def header_of(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def store(path, tensors, metadata=None):
    save_file({key: tensor.clone().contiguous() for key, tensor in tensors.items()}, path, metadata)
    return path


KOHYA = ("lora_down.weight", "lora_up.weight")


def kohya(lora, blocks="sgm", alpha=None):
    tensors = {}
    for path, (down, up) in lora.modules.items():
        name = to_kohya(path, blocks)
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(alpha(path))
    return tensors
