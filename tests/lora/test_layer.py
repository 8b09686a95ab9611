"""The branched layers against a dense derivation of y = W0 x + Σ_i diag(m_i) B_i A_i x_i."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unziplora.lora.inject import TARGETS, adapted_layers, add_lora, attention_linears, inject, remove, target_layers
from unziplora.lora.layer import BranchedLinear

RANK, IN, OUT = 3, 8, 6
RANKS = (("content", 3), ("style", 2))


def pair(seed: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(RANK, IN, generator=draw), torch.randn(OUT, RANK, generator=draw)


@pytest.fixture
def layer() -> BranchedLinear:
    torch.manual_seed(0)
    model = nn.ModuleDict({"lin": nn.Linear(IN, OUT).requires_grad_(False)})
    add_lora(model, "content", {"lin": pair(1)}, strength=0.7, stream="content")
    add_lora(model, "style", {"lin": pair(2)}, strength=1.3, stream="style")
    wrapped = model["lin"]
    assert isinstance(wrapped, BranchedLinear)
    with torch.no_grad():
        wrapped.branch("content").scale.copy_(torch.linspace(0.2, 1, OUT))
        wrapped.branch("style").scale.copy_(torch.linspace(1, 0.1, OUT))
        wrapped.branch("content").mask.copy_(torch.tensor([1, 0, 1, 1, 0, 1.0]))
        wrapped.branch("style").mask.copy_(torch.tensor([0, 1, 1, 0, 1, 1.0]))
    return wrapped


def dense(layer: BranchedLinear, inputs: dict[str, Tensor], leaves: dict[str, dict[str, Tensor]]) -> Tensor:
    """The equation itself, with dense matrices and no code of the package."""
    y = F.linear(inputs["full"], layer.base.weight, layer.base.bias)
    for name, strength in (("content", 0.7), ("style", 1.3)):
        leaf = leaves[name]
        column = torch.diag(layer.branch(name).mask * leaf["scale"])
        y = y + strength * inputs[name] @ (column @ leaf["up"] @ leaf["down"]).T
    return y


@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("observed", [(), ("content",), ("content", "style")])
def test_forward_and_gradients_equal_the_dense_equation(layer, joined, observed):
    torch.manual_seed(3)
    inputs = {name: torch.randn(2, 5, IN, requires_grad=True) for name in ("full", "content", "style")}
    if not joined:
        inputs = dict.fromkeys(inputs, inputs["full"])
    x = torch.cat(list(inputs.values()), dim=-1) if joined else inputs["full"]
    leaves = {
        name: {key: value.detach().clone().requires_grad_() for key, value in layer.branch(name).named_parameters()}
        for name in ("content", "style")
    }
    seen: dict[str, Tensor] = {}
    for name in observed:
        layer.branch(name).observer = lambda gradient, delta, name=name: seen.update({name: gradient})
    y, expected = layer(x), dense(layer, inputs, leaves)
    torch.testing.assert_close(y, expected)

    weight = torch.randn_like(y)
    wanted = torch.autograd.grad((expected * weight).sum(), [*dict.fromkeys(inputs.values())], retain_graph=True)
    got = torch.autograd.grad((y * weight).sum(), [*dict.fromkeys(inputs.values())], retain_graph=True)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)
    seen.clear()
    (y * weight).sum().backward()
    (expected * weight).sum().backward()
    for name in ("content", "style"):
        for key, leaf in leaves[name].items():
            gradient = getattr(layer.branch(name), key).grad
            if name in observed:
                assert gradient is None, "an observed branch learns nothing"
            else:
                torch.testing.assert_close(gradient, leaf.grad)
        if name in observed:
            by_hand = torch.einsum("bto,bti->oi", weight, inputs[name].detach())
            torch.testing.assert_close(seen[name], by_hand)
    assert layer.base.weight.grad is None


def test_masked_columns_neither_act_nor_learn(layer):
    closed = layer.branch("content").mask == 0
    x = torch.randn(4, 3 * IN)
    before = layer(x)
    with torch.no_grad():
        layer.branch("content").up[closed] += 100
    torch.testing.assert_close(layer(x), before, rtol=0, atol=0)
    layer(x).sum().backward()
    assert layer.branch("content").up.grad[closed].abs().max() == 0
    assert layer.branch("content").up.grad[~closed].abs().min() > 0
    assert layer.branch("content").scale.grad[closed].abs().max() == 0


def test_a_branch_ignores_the_prompts_of_the_others(layer):
    full, content, style = (torch.randn(2, 5, IN) for _ in range(3))
    layer.branch("style").strength = 0.0
    a = layer(torch.cat([full, content, style], -1))
    b = layer(torch.cat([full, content, torch.randn_like(style)], -1))
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert not torch.equal(a, layer(torch.cat([full, style, style], -1)))


def test_zero_b_is_the_frozen_layer_exactly():
    linear = nn.Linear(IN, OUT)
    model = nn.ModuleDict({"lin": linear})
    x = torch.randn(7, IN)
    expected = linear(x)
    add_lora(model, "content", {"lin": (torch.randn(RANK, IN), torch.zeros(OUT, RANK))})
    assert torch.equal(model["lin"](x), expected)


def test_low_rank_products_run_in_the_precision_of_autocast(layer):
    x = torch.randn(2, 5, 3 * IN)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.2)


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (1, 1, 0)])
def test_a_convolution_with_branches_equals_one_with_the_dense_kernel(kernel, stride, padding):
    torch.manual_seed(0)
    conv = nn.Conv2d(IN, OUT, kernel, stride, padding).requires_grad_(False)
    model, x = nn.ModuleDict({"conv": conv}), torch.randn(2, IN, 7, 5)
    pairs = {name: (torch.randn(rank, IN, kernel, kernel), torch.randn(OUT, rank, 1, 1)) for name, rank in RANKS}
    branches = {name: add_lora(model, name, {"conv": pair}, strength=0.5)["conv"] for name, pair in pairs.items()}
    leaves = {name: [factor.clone().requires_grad_() for factor in pair] for name, pair in pairs.items()}
    added = [0.5 * torch.einsum("or,rihw->oihw", up[:, :, 0, 0], down) for down, up in leaves.values()]
    expected = F.conv2d(x, conv.weight + sum(added), conv.bias, stride, padding)
    y = model["conv"](x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    weight = torch.randn_like(y)
    (y * weight).sum().backward()
    (expected * weight).sum().backward()
    for name, branch in branches.items():
        torch.testing.assert_close(branch.down.grad, leaves[name][0].grad, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(branch.up.grad, leaves[name][1].grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(branches["style"].delta(), added[1].detach())
    branches["style"].strength = 0.0
    without = F.conv2d(x, conv.weight + added[0], conv.bias, stride, padding)
    torch.testing.assert_close(model["conv"](x), without, rtol=1e-4, atol=1e-4)
    branches["content"].strength = 0.0
    assert torch.equal(model["conv"](x), conv(x)), "the frozen layer exactly"


def test_targets_name_all_layers_of_the_blocks_but_those_of_time(tiny_base):
    unet = tiny_base.unet
    layers = {name for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    others = {name for name in layers if "block" not in name or name.endswith(".time_emb_proj")}
    targets = target_layers(unet, TARGETS)
    assert set(targets) == layers - others
    inject(unet, targets)
    assert target_layers(unet, TARGETS) == targets, "adapted layers keep their names"
    remove(unet)
    assert not adapted_layers(unet)


def test_injection_adapts_every_attention_layer_and_removal_restores_the_unet(tiny_base):
    unet = tiny_base.unet
    paths = attention_linears(unet)
    assert len(paths) == 8 * sum(".transformer_blocks." in n and n.endswith(".attn1") for n, _ in unet.named_modules())
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    modules = {path: (torch.randn(2, unet.get_submodule(path).in_features),) for path in paths}
    modules = {p: (down, torch.randn(unet.get_submodule(p).out_features, 2)) for p, (down,) in modules.items()}
    add_lora(unet, "content", modules, stream="content")
    assert list(adapted_layers(unet)) == paths
    remove(unet)
    after = unet.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize(
    ("path", "message"),
    [("up_blocks.9.attn", "no layer"), ("down_blocks.0", "neither a linear layer nor a convolution")],
)
def test_injection_refuses_missing_and_other_layers(tiny_base, path, message):
    with pytest.raises(ValueError, match=message):
        inject(tiny_base.unet, [path])


def test_a_lora_of_another_width_is_refused(tiny_base):
    path = attention_linears(tiny_base.unet)[0]
    with pytest.raises(ValueError, match="the layer"):
        add_lora(tiny_base.unet, "content", {path: (torch.zeros(2, 5), torch.zeros(7, 2))})
