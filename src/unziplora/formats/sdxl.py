"""Names, widths and header entries of SDXL: all that LoRA files of this family alone have.

A UNet module has two dotted names. diffusers: `down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q`.
sgm, the original code of SDXL: `input_blocks.4.1.transformer_blocks.0.attn1.to_q`. The maps between them follow
from the topology (blocks of `layers` resnets) and not from SDXL's widths or depths, so they fit small bases too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

LAYERS = 2
"""Resnets per down block of SDXL (`layers_per_block`); up blocks have one more."""
CROSS_ATTENTION = 2048
"""Width of the text embeddings that SDXL's cross-attention reads."""

HEADER = {
    # Without an `sdxl_` value here A1111 takes the file for SD 1 and hides it.
    "ss_base_model_version": "sdxl_base_v1-0",
    "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
}
SMALL_HEADER = {
    # Programs list a file by these entries, and none of them could apply a LoRA of a small base to SDXL.
    "ss_base_model_version": "small-sdxl-topology",
    "modelspec.architecture": "small-sdxl-topology/lora",
}

UNDERSCORED = (
    "down_blocks up_blocks mid_block input_blocks middle_block output_blocks transformer_blocks to_q to_k "
    "to_v to_out proj_in proj_out conv_in conv_out conv_norm_out conv_shortcut time_emb_proj "
    "time_embedding add_embedding linear_1 linear_2 time_embed label_emb in_layers out_layers emb_layers "
    "skip_connection text_model text_projection self_attn q_proj k_proj v_proj out_proj layer_norm1 "
    "layer_norm2 final_layer_norm token_embedding position_embedding"
)
"""Parts of module names that contain an underscore, where a flattened name must not be cut."""

_RESNET = {  # diffusers → sgm
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_OUTSIDE = {  # diffusers → sgm
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_MIDDLE = {"resnets.0": "0", "attentions.0": "1", "resnets.1": "2"}  # diffusers → sgm
_RESNET_BACK = {sgm: name for name, sgm in _RESNET.items()}
_OUTSIDE_BACK = {sgm: name for name, sgm in _OUTSIDE.items()}
_MIDDLE_BACK = {sgm: name for name, sgm in _MIDDLE.items()}

_ATTENTION = (
    r"attentions\.\d+\.(proj_in|proj_out|norm|"
    r"transformer_blocks\.\d+\.(attn[12]\.(to_[qkv]|to_out\.0)|ff\.net\.(0\.proj|2)|norm[123]))"
)
_UNET = re.compile(
    rf"(down_blocks|up_blocks)\.\d+\.({_ATTENTION}|resnets\.\d+\.({'|'.join(_RESNET)})|(down|up)samplers\.0\.conv)"
    rf"|mid_block\.({_ATTENTION}|resnets\.\d+\.({'|'.join(_RESNET)}))"
    rf"|{'|'.join(re.escape(name) for name in _OUTSIDE)}"
)
_TEXT = re.compile(
    r"(text_model\.)?(encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12]|layer_norm[12])"
    r"|embeddings\.(token|position)_embedding|final_layer_norm)|text_projection"
)


def to_sgm(path: str, layers: int = LAYERS) -> str:
    """Return sgm's name of a module by diffusers' name: `up_blocks.0.attentions.1.…` → `output_blocks.1.1.…`.

    Raises:
        ValueError: the path is not a module of an SDXL UNet.
    """
    _check_unet_module(path, path)
    if path in _OUTSIDE:
        return _OUTSIDE[path]
    parts = path.split(".")
    if parts[0] == "mid_block":
        place, kind, rest = f"middle_block.{_MIDDLE['.'.join(parts[1:3])]}", parts[1], parts[3:]
    else:
        side, block, kind, layer, rest = parts[0], int(parts[1]), parts[2], int(parts[3]), parts[4:]
        first = block * (layers + 1)
        if kind == "downsamplers":
            return f"input_blocks.{first + layers + 1}.0.op"
        if kind == "upsamplers":  # the last part of its block: after resnet and attention
            return f"output_blocks.{first + layers}.2.conv"
        index = 1 + first + layer if side == "down_blocks" else first + layer
        side = "input_blocks" if side == "down_blocks" else "output_blocks"
        place = f"{side}.{index}.{int(kind == 'attentions')}"
    inner = ".".join(rest)
    return f"{place}.{_RESNET[inner] if kind == 'resnets' else inner}"


def from_sgm(path: str, layers: int = LAYERS) -> str:
    """Return diffusers' name of a module by sgm's name: `middle_block.1.…` → `mid_block.attentions.0.…`.

    Raises:
        ValueError: the path is not a module of an SDXL UNet.
    """
    try:
        name = _from_sgm(path, layers)
    except (KeyError, ValueError, IndexError):
        name = ""
    _check_unet_module(name, path)
    return name


def _from_sgm(path: str, layers: int) -> str:
    if path in _OUTSIDE_BACK:
        return _OUTSIDE_BACK[path]
    parts = path.split(".")
    if parts[0] == "middle_block":
        place, inner = f"mid_block.{_MIDDLE_BACK[parts[1]]}", ".".join(parts[2:])
        return f"{place}.{_RESNET_BACK[inner] if 'resnets' in place else inner}"
    index, part, inner = int(parts[1]), parts[2], ".".join(parts[3:])
    if parts[0] == "input_blocks":
        block, layer = divmod(index - 1, layers + 1)
        if inner == "op":
            return f"down_blocks.{block}.downsamplers.0.conv"
        side = "down_blocks"
    elif parts[0] == "output_blocks":
        block, layer = divmod(index, layers + 1)
        if inner == "conv":
            return f"up_blocks.{block}.upsamplers.0.conv"
        side = "up_blocks"
    else:
        raise ValueError(path)
    if part == "0":
        return f"{side}.{block}.resnets.{layer}.{_RESNET_BACK[inner]}"
    return f"{side}.{block}.attentions.{layer}.{inner}"


def is_sgm(path: str) -> bool:
    """Return whether a dotted name is sgm's."""
    return re.match(r"(input_blocks|middle_block|output_blocks|time_embed|label_emb|out)\.", path) is not None


def unet_module(name: str, layers: int = LAYERS) -> str:
    """Return diffusers' name of a UNet module by a dotted name of any origin.

    Older diffusers files spell `attn1.to_q` and `to_out.0` as `attn1.processor.to_q` and `to_out`.

    Raises:
        ValueError: the name is not a module of an SDXL UNet.
    """
    name = re.sub(r"\.to_out$", ".to_out.0", name.replace(".processor.", "."))
    if is_sgm(name):
        return from_sgm(name, layers)
    _check_unet_module(name, name)
    return name


def _check_unet_module(path: str, name: str) -> None:
    if not _UNET.fullmatch(path):
        raise ValueError(f"{name!r} is no module of an SDXL UNet")


def text_module(name: str) -> str:
    """Return a text encoder module's name with the level `text_model.`, which transformers 5 leaves out.

    Older diffusers files spell `q_proj` and `out_proj` as `to_q` and `to_out`.

    Raises:
        ValueError: the name is not a module of a CLIP text encoder.
    """
    name = re.sub(r"\.to_(q|k|v|out)$", r".\1_proj", name)
    if not _TEXT.fullmatch(name):
        raise ValueError(f"{name!r} is no module of a CLIP text encoder")
    return name if name.startswith("text_") else f"text_model.{name}"


_CROSS = re.compile(r"attn2\.to_[kv]$")
_SELF = re.compile(r"attn1\.to_[qkv]$")
_SQUARE = re.compile(r"attn1\.to_[kv]$|attn[12]\.to_(q|out\.0)$|attentions\.\d+\.proj_(in|out)$")
_WIDTHS = {"down_blocks.1": 640, "down_blocks.2": 1280, "mid_block": 1280, "up_blocks.0": 1280, "up_blocks.1": 640}

Shapes = Mapping[str, tuple[int, ...]]
"""Module path → shape of ΔW, (out, in)."""


def other_unet(shapes: Shapes, cross_attention: int | None = None) -> str | None:
    """Return the family of a UNet whose blocks have SDXL's names, or None if it is SDXL's.

    SD 1.x and 2.x have four levels and cross-attention widths of 768 and 1024; SDXL has three levels and 2048.

    Args:
        shapes: modules of a LoRA for this UNet.
        cross_attention: cross-attention width of the base, if known. A small base may have any width, so a LoRA of
            the same width is never refused.
    """
    widths = {shape[1] for path, shape in shapes.items() if _CROSS.search(path)}
    if cross_attention in widths:
        return None
    levels = [int(m[1]) for path in shapes if (m := re.match(r"(?:down|up)_blocks\.(\d+)", path))]
    four = max(levels, default=0) >= 3
    hidden = {shape[0] for path, shape in shapes.items() if _CROSS.search(path) or _SELF.search(path)}
    sd_sized = bool(hidden) and hidden <= {320, 640, 1280}
    for width, family in ((768, "SD 1.x"), (1024, "SD 2.x"), (1280, "the SDXL refiner")):
        if width in widths and (four or (sd_sized and width != 1280)):
            return f"{family} (cross-attention width {width})"
    return "a UNet of four levels (SD 1.x or 2.x)" if four else None


def has_sdxl_widths(shapes: Shapes) -> bool:
    """Return whether the transformer layers among these modules have the widths of SDXL itself, not of a small base."""
    for path, shape in shapes.items():
        width = next((w for block, w in _WIDTHS.items() if path.startswith(block + ".")), 0)
        if _expected_shape(path, width) not in (None, shape):
            return False
    return True


def _expected_shape(path: str, width: int) -> tuple[int, int] | None:
    """Return the shape (out, in) of a transformer layer in a block of this width; None for any other layer."""
    if _CROSS.search(path):
        return width, CROSS_ATTENTION
    if path.endswith("ff.net.0.proj"):
        return 8 * width, width  # GEGLU: twice four times the width
    if path.endswith("ff.net.2"):
        return width, 4 * width
    return (width, width) if _SQUARE.search(path) else None


def names_sdxl(metadata: Mapping[str, str]) -> bool:
    """Return whether a header names SDXL as the base where A1111 looks."""
    return metadata.get("ss_base_model_version", "").startswith("sdxl")
