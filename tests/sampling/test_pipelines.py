"""LoRAs in a diffusers pipeline: next to the adapters of others, replaced, removed, refused."""

from __future__ import annotations

import pytest
import tiny
import torch
from diffusers import StableDiffusionXLPipeline
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer

from unziplora.errors import UserError
from unziplora.lora.inject import attention_linears
from unziplora.lora.weights import Lora
from unziplora.sampling.pipelines import load_adapter, remove_adapter

MLP = "text_encoder_2.text_model.encoder.layers.0.mlp.fc1"
RANK = 4


@pytest.fixture
def pipe() -> StableDiffusionXLPipeline:
    return tiny.pipeline()


def other(pipe: StableDiffusionXLPipeline) -> None:
    """Give a pipeline an adapter of somebody else, in the UNet and in both text encoders."""
    for part, names in ((pipe.unet, ["to_q", "to_v"]), (pipe.text_encoder, ["q_proj"]), (pipe.text_encoder_2, ["fc2"])):
        part.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names, use_rslora=True), "other")


def scalings(pipe: StableDiffusionXLPipeline, name: str) -> dict[str, float]:
    parts = {"unet": pipe.unet, "text_encoder": pipe.text_encoder, "text_encoder_2": pipe.text_encoder_2}
    return {
        f"{part}.{path}": layer.scaling[name]
        for part, module in parts.items()
        for path, layer in module.named_modules()
        if isinstance(layer, BaseTunerLayer) and name in layer.scaling
    }


def active(module: torch.nn.Module) -> set[str]:
    return {
        name
        for layer in module.modules()
        if isinstance(layer, BaseTunerLayer)
        for name in layer.active_adapters
        if name in layer.scaling
    }


def shape_of(pipe: StableDiffusionXLPipeline, path: str) -> tuple[int, int]:
    encoder, _, rest = path.partition(".")
    module = dict(getattr(pipe, encoder).named_modules())
    weight = (module.get(rest) or module[rest.removeprefix("text_model.")]).weight
    return weight.shape[0], weight.shape[1]


def lora(pipe: StableDiffusionXLPipeline, **text: tuple[int, int]) -> Lora:
    """Return a LoRA of the UNet's attentions, and of text modules of a shape (out, in)."""
    paths = list(attention_linears(pipe.unet))
    words = {path: (torch.randn(2, i), torch.randn(o, 2)) for path, (o, i) in text.items()}
    return Lora(tiny.random_lora(pipe.unet, 1, paths), text=words)


def test_adapters_of_others_keep_every_strength(pipe: StableDiffusionXLPipeline) -> None:
    loaded = lora(pipe, **{MLP: shape_of(pipe, MLP)})
    other(pipe)
    blocks = {"down": 0.2, "mid": 0.5, "up": 1.0}
    pipe.set_adapters(["other"], [{"unet": blocks, "text_encoder": 0.3, "text_encoder_2": 0.7}])
    before = scalings(pipe, "other")
    assert {round(value, 6) for value in before.values()} == {0.4, 1.0, 2.0, 0.6, 1.4}  # × √4, for rsLoRA
    load_adapter(pipe, "content", loaded, 0.5)
    assert scalings(pipe, "other") == before
    assert active(pipe.unet) == active(pipe.text_encoder_2) == {"other", "content"}
    assert active(pipe.text_encoder) == {"other"}
    remove_adapter(pipe, "content")
    assert scalings(pipe, "other") == before
    assert active(pipe.unet) == {"other"}


def test_text_modules_equal_their_dense_product(pipe: StableDiffusionXLPipeline) -> None:
    loaded = lora(pipe, **{MLP: shape_of(pipe, MLP)})
    down, up = loaded.text[MLP]
    layer = next(module for path, module in pipe.text_encoder_2.named_modules() if path.endswith("layers.0.mlp.fc1"))
    expected = layer.weight + 0.5 * up @ down
    load_adapter(pipe, "style", loaded, 0.5)
    adapted = next(module for path, module in pipe.text_encoder_2.named_modules() if path.endswith("layers.0.mlp.fc1"))
    torch.testing.assert_close(adapted.weight + adapted.get_delta_weight("style"), expected)


def test_an_inactive_adapter_stays_inactive(pipe: StableDiffusionXLPipeline) -> None:
    loaded = lora(pipe)
    other(pipe)
    load_adapter(pipe, "content", loaded, 1.0)
    pipe.set_adapters(["content"])
    load_adapter(pipe, "style", loaded, 1.0)
    assert active(pipe.unet) == {"content", "style"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({MLP: (8, 3)}, "does not fit this pipeline .*fc1 is 8×3 in the LoRA"),
        ({MLP.replace("layers.0", "layers.99"): (8, 8)}, "the base has no text_encoder_2.*layers.99"),
        ({MLP.replace("encoder_2", "encoder"): (8, 8)}, "the base has no text_encoder.text_model"),
    ],
)
def test_a_lora_that_does_not_fit_changes_nothing(
    pipe: StableDiffusionXLPipeline, text: dict[str, tuple[int, int]], message: str
) -> None:
    pipe.text_encoder = None
    with pytest.raises(UserError, match=message):
        load_adapter(pipe, "style", lora(pipe, **text), 1.0)
    assert not any(isinstance(module, BaseTunerLayer) for module in pipe.unet.modules())


def test_a_compiled_unet_is_refused(pipe: StableDiffusionXLPipeline) -> None:
    loaded = lora(pipe)
    pipe.unet = torch.compile(pipe.unet)
    with pytest.raises(UserError, match=r"load LoRAs before torch\.compile"):
        load_adapter(pipe, "style", loaded, 1.0)


@pytest.mark.parametrize("offload", ["enable_sequential_cpu_offload", "enable_model_cpu_offload"])
def test_an_offloaded_pipeline_loads_text_modules_and_stays_offloaded(
    pipe: StableDiffusionXLPipeline, offload: str
) -> None:
    """The weights of one that is offloaded layer by layer have no values between two passes."""
    loaded = lora(pipe, **{MLP: shape_of(pipe, MLP)})
    twin = tiny.pipeline()
    load_adapter(twin, "style", loaded, 0.5)
    getattr(pipe, offload)(device="cpu")
    load_adapter(pipe, "style", loaded, 0.5)
    by_layer = "sequential" in offload
    for part in (pipe.unet, pipe.text_encoder_2):
        assert hasattr(part, "_hf_hook")
        assert {value.device.type for value in part.parameters()} == {"meta" if by_layer else "cpu"}
    pipe.remove_all_hooks()  # the CPU can hold layers, but not compute with them
    for part, expected in ((pipe.unet, twin.unet), (pipe.text_encoder_2, twin.text_encoder_2)):
        torch.testing.assert_close(dict(part.named_parameters()), dict(expected.named_parameters()))
