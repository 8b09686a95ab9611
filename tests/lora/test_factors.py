"""Factors that all layers share the work of, against every layer's own."""

import copy

import pytest
import torch
from torch import Tensor, nn

from unziplora.lora.factors import JointFactors, joint_factors
from unziplora.lora.inject import adapted_layers, add_lora, attention_linears, remove
from unziplora.lora.layer import Branch, BranchedLinear

RANK = 3


def add(unet: nn.Module, name: str, rank: int = RANK, strength: float = 1.0) -> dict[str, Branch]:
    """A random LoRA on all attentions, with column scales and masks."""
    draw = torch.Generator().manual_seed(len(name))
    pairs = {}
    for path in attention_linears(unet):
        layer = unet.get_submodule(path)
        shape = layer.out_features, layer.in_features
        pairs[path] = torch.randn(rank, shape[1], generator=draw) / 5, torch.randn(shape[0], rank, generator=draw) / 5
    branches = add_lora(unet, name, pairs, strength, stream=name)
    for branch in branches.values():
        with torch.no_grad():
            branch.scale.copy_(torch.rand(branch.scale.shape, generator=draw))
            branch.mask.copy_((torch.rand(branch.mask.shape, generator=draw) > 0.3).float())
    return branches


@pytest.fixture
def unet(tiny_base) -> nn.Module:
    unet = tiny_base.unet.requires_grad_(False)
    add(unet, "content")
    add(unet, "style", strength=0.6)
    return unet


def predict(unet: nn.Module, streams: int = 3) -> Tensor:
    config, draw = unet.config, torch.Generator().manual_seed(1)
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    given = {"text_embeds": torch.randn(2, pooled, generator=draw), "time_ids": torch.full((2, 6), 64.0)}
    latents = torch.randn(2, config.in_channels, 8, 8, generator=draw)
    tokens = torch.randn(2, 7, streams * config.cross_attention_dim, generator=draw)
    return unet(latents, 500, tokens, added_cond_kwargs=given).sample


def gradients(unet: nn.Module, streams: int = 3) -> tuple[Tensor, dict[str, Tensor]]:
    unet.zero_grad()
    out = predict(unet, streams)
    out.square().sum().backward()
    return out.detach(), {name: p.grad.clone() for name, p in unet.named_parameters() if p.grad is not None}


@pytest.fixture
def alone(unet) -> nn.Module:
    """The same UNet, every layer of which works by itself."""
    other = copy.deepcopy(unet)
    other._forward_pre_hooks.clear()
    return other


@pytest.mark.slow
@pytest.mark.parametrize("streams", [1, 3])
def test_outputs_and_gradients_equal_those_of_separate_layers(unet, alone, streams):
    predict(unet, streams)  # the first pass finds out how many prompts there are
    (out, found), (wanted, expected) = gradients(unet, streams), gradients(alone, streams)
    torch.testing.assert_close(out, wanted)
    assert found.keys() == expected.keys()
    assert any(name.endswith("scale") for name in found)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_layers_have_factors_during_a_pass_and_none_after_it(unet):
    predict(unet)
    layer, seen = next(iter(adapted_layers(unet).values())), []
    layer.base.register_forward_hook(lambda *_: seen.append(layer.factors))
    predict(unet)
    assert set(seen[0]) == {0}, "both LoRAs of a self-attention read the same"
    assert layer.factors is None


@pytest.mark.slow
@pytest.mark.parametrize("change", ["weights", "strength", "layers"])
def test_changes_between_passes_take_effect_in_the_next(unet, alone, change):
    before = predict(unet).detach()
    for each in (unet, alone):
        for layer in adapted_layers(each).values():
            branch = layer.branch("content")
            with torch.no_grad():
                if change == "weights":
                    branch.up.mul_(2)
                elif change == "strength":
                    branch.strength = 0.0
        if change == "layers":
            remove(each)
            add(each, "style", strength=0.3)
    after = predict(unet).detach()
    assert not torch.allclose(after, before)
    torch.testing.assert_close(after, predict(alone).detach())


def test_layers_with_unequal_ranks_compute_their_own_factors(tiny_base):
    unet = tiny_base.unet.requires_grad_(False)
    add(unet, "content")
    add(unet, "style", rank=5)
    other = copy.deepcopy(unet)
    other._forward_pre_hooks.clear()
    predict(unet, 1)
    (out, found), (wanted, expected) = gradients(unet, 1), gradients(other, 1)
    torch.testing.assert_close(out, wanted)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5)


def test_gradients_with_checkpointing_equal_those_without(unet):
    predict(unet)
    _, plain = gradients(unet)
    unet.enable_gradient_checkpointing()
    unet.train()
    layer, seen = next(iter(adapted_layers(unet).values())), []
    layer.base.register_forward_hook(lambda *_: seen.append(layer.factors))
    _, found = gradients(unet)
    assert seen == [None, None], "computed twice, by itself"
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, plain[name], rtol=1e-4, atol=1e-5)


def test_a_copied_unet_computes_its_own_factors(unet):
    other = copy.deepcopy(unet)
    with torch.no_grad():
        for layer in adapted_layers(other).values():
            layer.branch("style").up.zero_()
    assert not torch.allclose(predict(other), predict(unet))
    assert all(layer.group.layers == adapted_layers(other) for layer in adapted_layers(other).values())


def test_a_unet_without_loras_has_no_hooks(unet):
    plain = copy.deepcopy(unet)
    assert len(plain._forward_pre_hooks) == len(plain._forward_hooks) == 1
    remove(plain)
    assert not plain._forward_pre_hooks
    assert not plain._forward_hooks
    layers = adapted_layers(unet)
    assert all(layer.group.layers == layers for layer in layers.values()), "that of the copy is its own"


def test_joint_factors_equal_the_equation_in_the_requested_dtype():
    torch.manual_seed(0)
    layers = [[Branch(torch.randn(RANK, 8), torch.randn(6, RANK), strength) for strength in (1.0, 0.5)] for _ in "ab"]
    for branch in (branch for layer in layers for branch in layer):
        branch.mask[1] = 0
    for branches, (down, up) in zip(layers, joint_factors(layers, torch.bfloat16), strict=True):
        assert (down.dtype, up.dtype) == (torch.bfloat16, torch.bfloat16)
        dense = sum(b.strength * torch.diag(b.mask * b.scale) @ b.up @ b.down for b in branches)
        torch.testing.assert_close(up.float() @ down.float(), dense, rtol=0.05, atol=0.1)


def test_a_layer_outside_a_unet_computes_its_own_factors():
    layer = BranchedLinear(nn.Linear(8, 6), JointFactors(nn.Identity()))
    layer.branches["content"] = Branch(torch.randn(RANK, 8), torch.randn(6, RANK))
    x = torch.randn(2, 8)
    branch = layer.branch("content")
    torch.testing.assert_close(layer(x), layer.base(x) + x @ (branch.up @ branch.down).T)
