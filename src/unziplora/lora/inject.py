"""LoRA branches in a UNet: where they can go, how they get there, and how the UNet is restored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import cast

from torch import Tensor, nn

from unziplora.lora.algebra import shape
from unziplora.lora.factors import JointFactors
from unziplora.lora.layer import AdaptedLayer, Branch, BranchedConv, BranchedLinear, LayerGroup, beneath_adapters

TARGETS = {
    "attention": (".to_q", ".to_k", ".to_v", ".to_out.0"),
    "feed-forward": (".ff.net.0.proj", ".ff.net.2"),
    "projections": (".proj_in", ".proj_out"),
    "convolutions": (".conv1", ".conv2", ".conv_shortcut", "samplers.0.conv"),
}
"""Kinds of layers in a UNet's blocks → endings of their paths; the convolutions are those between the transformers."""


def adapted_layers(unet: nn.Module) -> dict[str, AdaptedLayer]:
    """Return the adapted layers of a UNet by module path, such as `mid_block…attn1.to_q`."""
    return {name: module for name, module in unet.named_modules() if isinstance(module, AdaptedLayer)}


def inject(unet: nn.Module, paths: Iterable[str]) -> dict[str, AdaptedLayer]:
    """Wrap the named layers of a UNet in place, unless they are already, and return the adapted layers by path.

    Raises:
        ValueError: a path is not that of a linear layer or a convolution of this UNet.
    """
    layers: dict[str, AdaptedLayer] = {}
    linears = (layer for layer in adapted_layers(unet).values() if isinstance(layer, BranchedLinear))
    group: LayerGroup | None = next((layer.group for layer in linears), None)
    for path in paths:
        try:
            module = unet.get_submodule(path)
        except AttributeError:
            raise ValueError(f"the UNet has no layer {path!r}") from None
        frozen = beneath_adapters(module)  # PEFT's layer has the attributes of the one beneath that matter here
        if isinstance(frozen, nn.Linear):
            group = group or JointFactors(unet)
            module = group.layers[path] = BranchedLinear(cast("nn.Linear", module), group)
            unet.set_submodule(path, module)
        elif isinstance(frozen, nn.Conv2d):
            module = BranchedConv(cast("nn.Conv2d", module))
            unet.set_submodule(path, module)
        if not isinstance(module, AdaptedLayer):
            raise ValueError(f"{path!r} is a {type(module).__name__}, neither a linear layer nor a convolution")
        layers[path] = module
    return layers


def add_lora(
    unet: nn.Module,
    name: str,
    modules: Mapping[str, tuple[Tensor, Tensor]],
    strength: float = 1.0,
    stream: str = "full",
) -> dict[str, Branch]:
    """Add a LoRA (module path → A and B, see `Branch`) to a UNet in place and return its branches by path.

    Raises:
        ValueError: a module is missing or of another shape.
    """
    layers = inject(unet, modules)
    try:
        branches = {path: _branch(layer, *modules[path], strength, stream, path) for path, layer in layers.items()}
    except BaseException:  # memory may run out in the middle
        for path, layer in layers.items():
            if not layer.branches:
                unwrap(unet, path)
        raise
    for path, branch in branches.items():
        layers[path].branches[name] = branch
    return branches


def _branch(layer: AdaptedLayer, down: Tensor, up: Tensor, strength: float, stream: str, path: str) -> Branch:
    weight = layer.base.weight
    if shape((down, up)) != tuple(weight.shape):
        raise ValueError(f"{path}: the LoRA is {shape((down, up))}, the layer {tuple(weight.shape)}")
    return Branch(down.to(weight.device), up.to(weight.device), strength, stream)


def unwrap(unet: nn.Module, path: str) -> None:
    """Replace one adapted layer with its frozen layer."""
    layer = unet.get_submodule(path)
    assert isinstance(layer, AdaptedLayer), f"{path} is not adapted"
    unet.set_submodule(path, layer.base)
    if isinstance(layer, BranchedLinear):
        del layer.group.layers[path]
        if not layer.group.layers:
            layer.group.detach()


def remove(unet: nn.Module) -> None:
    """Remove all LoRA branches of a UNet."""
    for path in adapted_layers(unet):
        unwrap(unet, path)


def target_layers(unet: nn.Module, targets: Iterable[str]) -> list[str]:
    """Return the paths of some kinds of layers (`TARGETS`) in a UNet's blocks, in module order."""
    kinds = (nn.Linear, nn.Conv2d, AdaptedLayer)
    return filter_targets([name for name, module in unet.named_modules() if isinstance(module, kinds)], targets)


def filter_targets(paths: Iterable[str], targets: Iterable[str]) -> list[str]:
    """Return the paths that lead to some kinds of layers (`TARGETS`)."""
    ends = tuple(end for target in targets for end in TARGETS[target])
    return [path for path in paths if path.endswith(ends)]


def attention_linears(unet: nn.Module) -> list[str]:
    """Return the paths of q, k, v and out of every attention of a UNet, in module order (560 for SDXL)."""
    return target_layers(unet, ["attention"])
