"""A LoRA in memory: pairs of matrices by module path, checked against a UNet and scaled by block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import nn

from unziplora.errors import UserError
from unziplora.lora.algebra import Pair, scale, shape
from unziplora.lora.blocks import block_of, is_inside


@dataclass(frozen=True)
class Lora:
    """A LoRA in memory, strength 1: alpha is folded into B.

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
    """Check that every module of a LoRA exists in a UNet, adapted already or not, and has its shape.

    Raises:
        UserError: names the first module that is missing or of another shape, and the base it was trained on.
    """
    weights = {
        path.removesuffix(".base").removesuffix(".base_layer"): tuple(module.weight.shape)
        for path, module in unet.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }
    for path, pair in lora.modules.items():
        check_shape(lora, path, pair, weights.get(path), name, base)


def check_shape(lora: Lora, path: str, pair: Pair, wanted: tuple[int, ...] | None, name: str, base: str) -> None:
    """Check one module's pair of a LoRA against the shape of the weight that it changes; None: there is none.

    Raises:
        UserError: it is missing or of another shape.
    """
    if wanted is None:
        raise wrong_base_error(lora, name, base, f"the base has no {path}")
    if shape(pair) != wanted:
        shapes = f"{format_shape(shape(pair))} in the LoRA and {format_shape(wanted)} in the base"
        raise wrong_base_error(lora, name, base, f"{path} is {shapes}")


def wrong_base_error(lora: Lora, name: str, base: str, why: str) -> UserError:
    """The error for a LoRA that was made for another base."""
    trained = lora.metadata.get("ss_sd_model_name") or lora.metadata.get("ss_base_model_version")
    told = f"; it was trained on {trained}" if trained else ""
    return UserError(f"{name} does not fit {base} ({why}){told}. Take the base it was made for")


def format_shape(shape: tuple[int, ...]) -> str:
    """A shape in words: 4×8."""
    return "×".join(map(str, shape))


def scale_blocks(lora: Lora, strengths: Mapping[str, float], name: str = "the LoRA") -> Lora:
    """The LoRA with the ΔW of named blocks multiplied, such as {"up_blocks.0.attentions.1": 0.5}.

    A name may be any beginning of a module's path, at a dot; of several that fit, the longest counts. Errors as in
    `check_strengths`.
    """
    check_strengths(lora, strengths, name)
    modules = {}
    for path, pair in lora.modules.items():
        fitting = [name for name in strengths if is_inside(path, name)]
        modules[path] = scale(pair, strengths[max(fitting, key=len)]) if fitting else pair
    return replace(lora, modules=modules)


def check_strengths(lora: Lora, strengths: Mapping[str, float], name: str = "the LoRA") -> None:
    """Refuse strengths of blocks that a LoRA has not.

    Raises:
        UserError: a name fits no module of this LoRA.
    """
    for block in sorted(strengths):
        if not any(is_inside(path, block) for path in lora.modules):
            raise UserError(f"{name} has no modules in block {block!r}; it has {', '.join(lora_blocks(lora))}")


def lora_blocks(lora: Lora) -> list[str]:
    """The blocks that a LoRA has modules in, such as `up_blocks.0.attentions.1`, in order of their names."""
    return sorted({block_of(path) for path in lora.modules})
