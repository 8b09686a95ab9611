"""Names, widths and header entries of SDXL: all that LoRA files of this family alone have.

A UNet module has two dotted names. diffusers: `down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q`.
sgm, the original code of SDXL: `input_blocks.4.1.transformer_blocks.0.attn1.to_q`. The maps between them follow
from the topology (blocks of `layers` resnets) and not from SDXL's widths or depths, so they fit small bases too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache

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
    "layer_norm2 final_layer_norm token_embedding position_embedding in_proj c_fc c_proj"
)
"""Parts of module names that contain an underscore, where a flattened name must not be cut."""

FUSED = "self_attn.in_proj"
"""End of the name of OpenCLIP's projection to queries, keys and values, which transformers stores separately."""

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
_MIDDLE = {  # diffusers → sgm
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
_LEVELS = 4
"""Levels of down and up blocks whose names are known; SDXL has three, SD 1 and 2 have four."""

_ATTENTION = (
    r"attentions\.N\.(proj_in|proj_out|norm|"
    r"transformer_blocks\.N\.(attn[12]\.(to_[qkv]|to_out\.0)|ff\.net\.(0\.proj|2)|norm[123]))"
)
_UNET = re.compile(
    (
        rf"(down_blocks|up_blocks)\.N\.({_ATTENTION}|resnets\.N\.({'|'.join(_RESNET)})|(down|up)samplers\.0\.conv)"
        rf"|mid_block\.({_ATTENTION}|resnets\.N\.({'|'.join(_RESNET)}))"
        rf"|{'|'.join(re.escape(name) for name in _OUTSIDE)}"
    ).replace("N", "[0-9]{1,2}")
)
_TEXT = re.compile(
    r"encoder\.layers\.[0-9]{1,2}\.(self_attn\.((q|k|v|out)_proj|in_proj)|mlp\.fc[12]|layer_norm[12])"
    r"|embeddings\.(token|position)_embedding|final_layer_norm"
)
_OPEN_CLIP = {"attn.": "self_attn.", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}  # → transformers


@cache
def _places(layers: int) -> dict[str, str]:
    """Return diffusers' name of each part of a UNet with `layers` resnets per down block → sgm's name."""
    places = {**_MIDDLE, **_OUTSIDE}
    for block in range(_LEVELS):
        down, up, first = f"down_blocks.{block}", f"up_blocks.{block}", block * (layers + 1)
        for index, kind in enumerate(("resnets", "attentions")):
            places |= {f"{down}.{kind}.{layer}": f"input_blocks.{first + layer + 1}.{index}" for layer in range(layers)}
            places |= {f"{up}.{kind}.{layer}": f"output_blocks.{first + layer}.{index}" for layer in range(layers + 1)}
        places[f"{down}.downsamplers.0.conv"] = f"input_blocks.{first + layers + 1}.0.op"
        places[f"{up}.upsamplers.0.conv"] = f"output_blocks.{first + layers}.2.conv"  # after resnet and attention
    return places


@cache
def _places_back(layers: int) -> dict[str, str]:
    places = {sgm: name for name, sgm in _places(layers).items()}
    # Where a level has no attention, its upsampler comes right after the resnet.
    return places | {sgm.replace(".2.conv", ".1.conv"): name for sgm, name in places.items() if sgm.endswith(".conv")}


def to_sgm(path: str, layers: int = LAYERS) -> str:
    """Return sgm's name of a module by diffusers' name: `up_blocks.0.attentions.1.…` → `output_blocks.1.1.…`.

    Raises:
        ValueError: the path is not a module of an SDXL UNet.
    """
    _check_unet_module(path, path)
    place, inner = _cut(path, _places(layers))
    return _places(layers)[place] + (f".{_RESNET.get(inner, inner)}" if inner else "")


def from_sgm(path: str, layers: int = LAYERS) -> str:
    """Return diffusers' name of a module by sgm's name: `middle_block.1.…` → `mid_block.attentions.0.…`.

    Raises:
        ValueError: the path is not a module of an SDXL UNet.
    """
    place, inner = _cut(path, _places_back(layers))
    resnet = {sgm: name for name, sgm in _RESNET.items()}
    name = _places_back(layers)[place] + (f".{resnet.get(inner, inner)}" if inner else "")
    _check_unet_module(name, path)
    return name


def _cut(path: str, places: Mapping[str, str]) -> tuple[str, str]:
    """Split a module's name into one of the places and the rest.

    Raises:
        ValueError: the name is in none of the places.
    """
    parts = path.split(".")
    for end in range(min(5, len(parts)), 0, -1):
        if (place := ".".join(parts[:end])) in places:
            return place, ".".join(parts[end:])
    raise ValueError(f"{path!r} is not a module of an SDXL UNet")


def is_sgm(path: str) -> bool:
    """Return whether a dotted name is sgm's."""
    return path.startswith(("input_blocks.", "middle_block.", "output_blocks.", "time_embed.", "label_emb.", "out."))


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
        raise ValueError(f"{name!r} is not a module of an SDXL UNet")


def text_module(name: str) -> str:
    """Return a text encoder module's name with the level `text_model.`, which transformers 5 leaves out.

    Older diffusers files spell `q_proj` and `out_proj` as `to_q` and `to_out`. OpenCLIP's names
    (`transformer.resblocks.0.attn.in_proj`) are those of the second encoder in SDXL's checkpoints.

    Raises:
        ValueError: the name is not a module of a CLIP text encoder.
    """
    if match := re.fullmatch(r"transformer\.resblocks\.([0-9]{1,2})\.(attn\.|mlp\.c_fc|mlp\.c_proj)(\w*)", name):
        name = f"encoder.layers.{match[1]}.{_OPEN_CLIP[match[2]]}{match[3]}"
    module = re.sub(r"\.to_(q|k|v|out)$", r".\1_proj", name).removeprefix("text_model.")
    if module == "text_projection":
        return module
    if not _TEXT.fullmatch(module):
        raise ValueError(f"{name!r} is not a module of a CLIP text encoder")
    return f"text_model.{module}"


_CROSS = re.compile(r"attn2\.to_[kv]$")
_SELF = re.compile(r"attn1\.to_[qkv]$")
_SQUARE = re.compile(r"attn1\.to_[kv]$|attn[12]\.to_(q|out\.0)$|attentions\.\d+\.proj_(in|out)$")
_LEVEL_WIDE = re.compile(r"\.(resnets\.\d+\.(conv1|conv2|conv_shortcut|time_emb_proj)|(down|up)samplers\.0\.conv)$")
_SIZES = {  # block → width, and blocks per transformer
    "down_blocks.0": (320, 0),
    "down_blocks.1": (640, 2),
    "down_blocks.2": (1280, 10),
    "mid_block": (1280, 10),
    "up_blocks.0": (1280, 10),
    "up_blocks.1": (640, 2),
    "up_blocks.2": (320, 0),
}


def other_unet(shapes: Mapping[str, tuple[int, ...]], cross_attention: int | None = None) -> str | None:
    """Return the family of a UNet whose blocks have SDXL's names, or None if it is SDXL's.

    SD 1.x and 2.x have four levels and cross-attention widths of 768 and 1024; SDXL has three levels and 2048.

    Args:
        shapes: UNet module → shape of ΔW (out, in).
        cross_attention: that width of the base, if known; small bases may have any, and their LoRAs are not refused.
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


def has_sdxl_widths(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Return whether the modules inside blocks are those of SDXL itself, not of another base."""
    for path, shape in shapes.items():
        width, depth = next((size for block, size in _SIZES.items() if path.startswith(block + ".")), (0, 0))
        index = re.search(r"\.transformer_blocks\.(\d+)\.", path)
        if _expected_shape(path, width) not in (None, shape) or (index and int(index[1]) >= depth):
            return False
        if _LEVEL_WIDE.search(path) and shape[0] != width:
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
