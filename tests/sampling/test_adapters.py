"""LoRAs in a base's text encoders, compared with weights changed by hand, and beside adapters of others."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import pytest
import tiny
import torch
from peft import LoraConfig
from torch import Tensor, nn

from unziplora.errors import UserError
from unziplora.formats import writers
from unziplora.lora.algebra import Pair
from unziplora.lora.inject import Branch, adapted_layers, target_layers
from unziplora.lora.weights import Lora, check_fits
from unziplora.models.base import Base
from unziplora.models.text import Prompts, encode_batch
from unziplora.sampling.adapters import AttachedLoras, NamedLora
from unziplora.sampling.pipeline import Settings, generate_latents

LAYER = "text_encoder.text_model.encoder.layers.0"
LAYER_2 = "text_encoder_2.text_model.encoder.layers.0"


def pairs(base: Base, ranks: Mapping[str, int]) -> dict[str, Pair]:
    """Return random pairs for text modules, large enough to matter."""
    draw, result = torch.Generator().manual_seed(len(ranks)), {}
    for path, rank in ranks.items():
        weight = linear(base, path).weight
        result[path] = (
            torch.randn(rank, weight.shape[1], generator=draw),
            torch.randn(weight.shape[0], rank, generator=draw),
        )
    return result


def linear(base: Base, full: str) -> torch.nn.Linear:
    component, _, path = full.partition(".")
    named = dict(getattr(base.pipe, component).named_modules())
    return named.get(path) or named[path.removeprefix("text_model.")]


@torch.no_grad()
def folded(base: Base, loras: list[dict[str, Pair]]) -> tuple[Tensor, Tensor]:
    """Return the encoders' output with B A added to their weights; the base is left as it was."""
    before = [(linear(base, path).weight, linear(base, path).weight.clone()) for lora in loras for path in lora]
    for lora in loras:
        for path, (down, up) in lora.items():
            linear(base, path).weight += up @ down
    result = output(base)
    for weight, value in reversed(before):
        weight.copy_(value)
    return result


CONTENT = {f"{LAYER}.self_attn.q_proj": 2, f"{LAYER_2}.self_attn.out_proj": 2}
STYLE = {f"{LAYER}.self_attn.q_proj": 3, f"{LAYER}.self_attn.v_proj": 3}


def named(name: str, modules: dict[str, Pair]) -> NamedLora:
    return NamedLora(name, Lora({}, text=modules), {}, f"{name}.safetensors")


@contextmanager
def attached(base: Base, *parts: NamedLora) -> Iterator[AttachedLoras]:
    """Temporarily attach LoRAs: all tests share the text encoders."""
    with AttachedLoras(base, list(parts)) as loras:
        yield loras


def output(base: Base) -> tuple[Tensor, Tensor]:
    rows = encode_batch(base, ["a cat"])
    return rows.tokens, rows.pooled


@torch.no_grad()
def test_two_text_encoder_loras_add_up_by_strength_and_are_removed(fresh_base) -> None:
    base = fresh_base()
    content, style = pairs(base, CONTENT), pairs(base, STYLE)
    plain, both, alone = (folded(base, loras) for loras in ([], [content, style], [content]))
    assert not torch.allclose(both[0], alone[0], atol=1e-2)
    with attached(base, named("content", content), named("style", style)) as loras:
        for expected, strengths in ((both, {}), (alone, {"style": 0.0}), (both, {"style": 1.0})):
            loras.set_strengths(**strengths)
            torch.testing.assert_close(output(base), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output(base), plain, rtol=0, atol=0)


@torch.no_grad()
def test_text_encoder_loras_add_up_at_the_default_strength(fresh_base) -> None:
    base = fresh_base()
    content, style = pairs(base, CONTENT), pairs(base, STYLE)
    expected = folded(base, [content, style])
    with attached(base, named("content", content), named("style", style)):
        torch.testing.assert_close(output(base), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "ranks",
    [
        {f"{LAYER}.mlp.fc1": 2, f"{LAYER}.mlp.fc2": 2},
        {"text_encoder_2.text_projection": 2},
        {"text_encoder_2.text_projection": 2, f"{LAYER_2}.self_attn.q_proj": 4, f"{LAYER}.mlp.fc2": 1},
    ],
    ids=["no attention", "projection alone", "ranks that differ"],
)
@torch.no_grad()
def test_any_text_encoder_module_of_any_rank_is_attached(fresh_base, ranks: dict[str, int]) -> None:
    base = fresh_base()
    lora = pairs(base, ranks)
    expected = folded(base, [lora])
    with attached(base, named("content", lora)):
        torch.testing.assert_close(output(base), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("path", "shape", "words"),
    [
        (f"{LAYER}.self_attn.q_proj", (8, 8), f"{LAYER}.self_attn.q_proj is 8×8 in the LoRA and"),
        ("text_encoder.text_model.encoder.layers.99.mlp.fc1", (8, 8), "the base has no text_encoder.text_model"),
    ],
    ids=["shape", "layer"],
)
def test_misfit_is_named_and_leaves_the_base_unchanged(fresh_base, path, shape, words: str) -> None:
    base = fresh_base()
    text = {path: (torch.zeros(2, shape[1]), torch.zeros(shape[0], 2))}
    unet = tiny.random_lora(base.unet, 1)
    with pytest.raises(UserError, match=words):
        AttachedLoras(base, [NamedLora("content", Lora(unet, text=text), {}, "cat.safetensors")])
    assert not any("lora" in name for encoder in base.text_encoders for name, _ in encoder.named_parameters())
    assert not [name for name, _ in base.unet.named_parameters() if "branches" in name]


@torch.no_grad()
def test_lack_of_memory_leaves_the_base_unchanged(fresh_base, monkeypatch: pytest.MonkeyPatch) -> None:
    base, made = fresh_base(), []
    names = [name for name, _ in base.unet.named_modules()]

    class Scarce(Branch):
        def __init__(self, *args: object) -> None:
            made.append(0)
            if len(made) > 2:
                raise MemoryError
            super().__init__(*args)

    monkeypatch.setattr("unziplora.lora.inject.Branch", Scarce)
    paths = list(target_layers(base.unet, ["attention"]))[:4]
    layers = {path: base.unet.get_submodule(path).weight for path in paths}
    modules = {path: (torch.ones(1, w.shape[1]), torch.ones(w.shape[0], 1)) for path, w in layers.items()}
    with pytest.raises(MemoryError):
        AttachedLoras(base, [NamedLora("style", Lora(modules), {}, "s")])
    assert not adapted_layers(base.unet)
    assert names == [name for name, _ in base.unet.named_modules()]


def test_other_adapters_stay_active_in_text_encoders(fresh_base) -> None:
    base = fresh_base()
    theirs, ours = pairs(base, CONTENT), pairs(base, STYLE)
    plain, both = output(base), folded(base, [theirs, ours])
    with attached(base, named("theirs", theirs)):
        before = output(base)
        with attached(base, named("style", ours)):
            torch.testing.assert_close(output(base), both, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(output(base), before, rtol=0, atol=0)
        assert not any("style" in name for encoder in base.text_encoders for name, _ in encoder.named_parameters())
    torch.testing.assert_close(output(base), plain, rtol=0, atol=0)
    assert not any("lora" in name for encoder in base.text_encoders for name, _ in encoder.named_parameters())


def test_other_adapters_stay_active_in_the_unet(fresh_base) -> None:
    base = fresh_base()
    convolution = {"down_blocks.1.resnets.0.conv1": (torch.ones(2, 8, 3, 3), torch.ones(16, 2, 1, 1))}
    other = LoraConfig(r=2, target_modules=["down_blocks.0.resnets.0.conv1"])
    base.unet.add_adapter(other, adapter_name="theirs")
    with AttachedLoras(base, [NamedLora("style", Lora(convolution), {}, "style.safetensors")]):
        assert any("style" in name for name, _ in base.unet.named_parameters())
        assert base.unet.active_adapters() == ["theirs"]
    assert set(base.unet.peft_config) == {"theirs"}
    assert base.unet.active_adapters() == ["theirs"]
    assert not any("style" in name for name, _ in base.unet.named_parameters())


def image(base: Base, prompts: Prompts | str = "a cat") -> Tensor:
    return generate_latents(base, prompts, [0], Settings(steps=2))


LAYERS = ["down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", "down_blocks.1.resnets.0.conv1"]
THEIRS = [*LAYERS, "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"]  # reads the prompts


@torch.no_grad()
def test_adapters_of_others_add_up_with_ours_in_the_same_layers(fresh_base) -> None:
    """The same two LoRAs, once both through PEFT and once one of them attached, under a name that is taken."""
    base = fresh_base()
    theirs, ours = (
        Lora(tiny.random_lora(base.unet, seed, layers), text=pairs(base, text))
        for seed, layers, text in ((1, THEIRS, CONTENT), (2, LAYERS, STYLE))
    )
    for name, lora in (("style", theirs), ("ours", ours)):
        base.pipe.load_lora_weights(writers.diffusers({**lora.modules, **lora.text}, None)[0], adapter_name=name)
    base.pipe.set_adapters(["style", "ours"], [0.8, 0.5])
    expected = image(base)
    base.pipe.delete_adapters("ours")
    before = image(base)
    assert not torch.allclose(before, expected, atol=1e-3)
    with AttachedLoras(base, [NamedLora("style", ours, {}, "style.safetensors")]) as loras:
        loras.set_strengths(style=0.5)
        for prompts in ("a cat", Prompts("a cat", "a cat", "a cat")):
            torch.testing.assert_close(image(base, prompts), expected, rtol=1e-4, atol=1e-4)
        check_fits(ours, base.unet)
    torch.testing.assert_close(image(base), before, rtol=0, atol=0)
    assert base.pipe.get_active_adapters() == ["style"]
    base.pipe.unload_lora_weights()
    assert all(type(base.unet.get_submodule(path)) in (nn.Linear, nn.Conv2d) for path in THEIRS)
