"""LoRAs in a diffusers pipeline, as adapters of PEFT like those that diffusers loads itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from diffusers import StableDiffusionXLPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from unziplora.errors import UserError
from unziplora.formats import writers
from unziplora.lora.algebra import scale
from unziplora.lora.weights import Lora, check_fits
from unziplora.models.text import ENCODERS
from unziplora.sampling.adapters import load_text, text_paths
from unziplora.utils.logging import quiet


def load_adapter(pipe: StableDiffusionXLPipeline, name: str, lora: Lora, strength: float) -> None:
    """Load a LoRA into a pipeline as an adapter, in place of one of the same name; others stay as they are.

    The strength becomes part of the weights, so that `pipe.set_adapters` starts from 1. Offloading goes on afterwards.

    Raises:
        UserError: the LoRA does not fit the pipeline, or its UNet is compiled. Nothing has changed then.
    """
    source, base = f"the {name} LoRA", "this pipeline"
    if hasattr(pipe.unet, "_orig_mod"):
        raise UserError("the pipeline's UNet is compiled: load LoRAs before torch.compile, or use pipe.unet.compile()")
    check_fits(lora, pipe.unet, source, base)
    encoders = {component: getattr(pipe, component) for component in ENCODERS}
    for component, encoder in encoders.items():
        text_paths(encoder, component, lora, source, base)
    text = Lora({}, text={path: scale(pair, strength) for path, pair in lora.text.items()})
    tensors, _ = writers.diffusers({path: scale(pair, strength) for path, pair in lora.modules.items()}, None)
    with _offloading_paused(pipe):
        parts = [part for part in (pipe.unet, *encoders.values()) if part is not None]
        active = [_active_adapters(part) for part in parts]
        remove_adapter(pipe, name)
        try:
            with quiet():
                if tensors:
                    pipe.load_lora_weights(tensors, adapter_name=name)
                for component, encoder in encoders.items():
                    if encoder is not None:
                        load_text(encoder, component, text, name, source, base)
        except BaseException:
            remove_adapter(pipe, name)
            raise
        finally:
            for part, names in zip(parts, active, strict=True):
                _activate(part, [*names, name])


@contextmanager
def _offloading_paused(pipe: StableDiffusionXLPipeline) -> Iterator[None]:
    """Take diffusers' offloading off a pipeline and put it back, as its own loader does for a part: for new layers too.

    Weights that are offloaded layer by layer have no values in between (they are on the device `meta`). Offloading by
    groups is left to the loader itself.
    """
    whole, by_layer, *_ = pipe._optionally_disable_offloading(pipe)
    device = getattr(pipe, "_offload_device", None)
    try:
        yield
    finally:
        if whole:
            pipe.enable_model_cpu_offload(device=device)
        elif by_layer:
            pipe.enable_sequential_cpu_offload(device=device)


def remove_adapter(pipe: StableDiffusionXLPipeline, name: str) -> None:
    """Remove an adapter from a pipeline that may have it."""
    if any(name in adapters for adapters in pipe.get_list_adapters().values()):
        pipe.delete_adapters(name)


def _layers(part: nn.Module) -> Iterator[BaseTunerLayer]:
    return (module for module in part.modules() if isinstance(module, BaseTunerLayer))


def _active_adapters(part: nn.Module) -> list[str]:
    """Return the adapters that are active in any layer of a part, in the order in which they were activated."""
    return list(dict.fromkeys(name for layer in _layers(part) for name in layer.active_adapters))


def _activate(part: nn.Module, names: list[str]) -> None:
    """Activate adapters, as far as a layer has them, at the strengths that they have."""
    for layer in _layers(part):
        layer.set_adapter([name for name in dict.fromkeys(names) if name in layer.scaling])
