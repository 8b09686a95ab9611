"""Attention kernels in training: equal numbers, selected by device and size."""

import pytest
import torch
from torch.nn import functional as F

from recipes.base.loop import training_attention


def fused() -> bool:
    return torch.backends.cuda.flash_sdp_enabled()  # one switch for all devices, despite its name


@pytest.mark.parametrize(("device", "tokens", "plain"), [("cpu", 64, True), ("cpu", 4096, False), ("cuda", 64, False)])
def test_small_attention_on_a_cpu_uses_plain_products(device: str, tokens: int, plain: bool) -> None:
    with training_attention(device, tokens):
        assert fused() is not plain
    assert fused()


def test_both_kernels_have_equal_gradients() -> None:
    draw = torch.Generator().manual_seed(0)
    gradients = []
    queries = [torch.randn(2, 3, 20, 8, generator=draw) for _ in range(3)]
    for tokens in (20, 4096):
        inputs = [x.clone().requires_grad_() for x in queries]
        with training_attention("cpu", tokens):
            F.scaled_dot_product_attention(*inputs).square().sum().backward()
        gradients.append([x.grad for x in inputs])
    for mine, theirs in zip(*gradients, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5)
