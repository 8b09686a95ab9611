"""LoRAs in memory: pairs of matrices by module path, with checks against a base and strengths by block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import nn

from unziplora.errors import UserError
from unziplora.lora.algebra import Pair, scale, shape
from unziplora.lora.blocks import block_of, is_inside


@dataclass(frozen=True)
class Lora:
    """A LoRA at strength 1, with alpha folded into B.

    Attributes:
        modules: diffusers' path of a UNet module → (A [rank, in], B [out, rank]) in fp32.
        metadata: the header of its file.
        text: path of a text encoder's module, such as `text_encoder.text_model.encoder.layers.0.self_attn.q_proj`
            → its pair.
        alpha: the one alpha of all modules in its file. Written again, so that no number in the file is rounded.
    """

    modules: dict[str, Pair]
    metadata: dict[str, str] = field(default_factory=dict)
    text: dict[str, Pair] = field(default_factory=dict)
    alpha: float | None = None


def check_fits(lora: Lora, unet: nn.Module, name: str = "the LoRA", base: str = "this base") -> None:
    """Check that a UNet, adapted or not, has every module of a LoRA in the same shape; messages contain the names.

    Raises:
        UserError: a module is missing or of another shape; the message names the base that the LoRA was made for.
    """
    weights = {
        path.removesuffix(".base_layer").removesuffix(".base"): tuple(module.weight.shape)
        for path, module in unet.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }
    for path, pair in lora.modules.items():
        check_shape(lora, path, pair, weights.get(path), name, base)


def check_shape(lora: Lora, path: str, pair: Pair, weight: tuple[int, ...] | None, name: str, base: str) -> None:
    """Check the shape of one pair of a LoRA against that of the base's weight, None if the base has no such module.

    Raises:
        UserError: see `check_fits`.
    """
    if weight is None:
        raise wrong_base_error(lora, name, base, f"the base has no {path}")
    if shape(pair) != weight:
        shapes = f"{format_shape(shape(pair))} in the LoRA and {format_shape(weight)} in the base"
        raise wrong_base_error(lora, name, base, f"{path} is {shapes}")


def wrong_base_error(lora: Lora, name: str, base: str, why: str) -> UserError:
    """Return the error for a LoRA that was made for another base."""
    trained = lora.metadata.get("ss_sd_model_name") or lora.metadata.get("ss_base_model_version")
    origin = f"; it was trained on {trained}" if trained else ""
    return UserError(f"{name} does not fit {base} ({why}){origin}. Take the base it was made for")


def format_shape(shape: tuple[int, ...]) -> str:
    """Return a shape for messages, such as 4×8."""
    return "×".join(map(str, shape))


def scale_blocks(lora: Lora, strengths: Mapping[str, float], name: str = "the LoRA") -> Lora:
    """Return a LoRA with the ΔW of some blocks multiplied.

    Args:
        lora: LoRA to scale.
        strengths: block → factor, such as {"up_blocks.0.attentions.1": 0.5}. Any beginning of a module's path up to
            a dot counts as a block; the longest that fits decides.
        name: of the LoRA, in messages.

    Raises:
        UserError: see `check_strengths`.
    """
    check_strengths(lora, strengths, name)
    modules = {}
    for path, pair in lora.modules.items():
        blocks = [block for block in strengths if is_inside(path, block)]
        modules[path] = scale(pair, strengths[max(blocks, key=len)]) if blocks else pair
    return replace(lora, modules=modules)


def check_strengths(lora: Lora, strengths: Mapping[str, float], name: str = "the LoRA") -> None:
    """Check that a LoRA has modules in every block that a strength is set for.

    Raises:
        UserError: a block is empty; the message lists the LoRA's blocks.
    """
    for block in sorted(strengths):
        if not any(is_inside(path, block) for path in lora.modules):
            raise UserError(f"{name} has no modules in block {block!r}; it has {', '.join(lora_blocks(lora))}")


def lora_blocks(lora: Lora) -> list[str]:
    """Return the blocks that a LoRA changes, such as `up_blocks.0.attentions.1`, sorted by name."""
    return sorted({block_of(path) for path in lora.modules})
