"""Names of SDXL's modules in every layout that LoRA files use: pure maps from name to name.

Three spellings of one module exist. diffusers: `down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q`;
sgm, the original code of SDXL: `input_blocks.4.1.transformer_blocks.0.attn1.to_q`; kohya, either of the two
flattened: `lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q`. The maps follow from the topology
(blocks of `layers` resnets), not from SDXL's widths or depths, so they hold for small bases too.
"""

from __future__ import annotations

import re

LAYERS = 2
"""Resnets per down block of SDXL (`layers_per_block`); up blocks have one more."""

# Names that contain an underscore: where a flattened name is cut into parts again, these stay whole.
_WHOLE = (
    "down_blocks up_blocks mid_block input_blocks middle_block output_blocks transformer_blocks to_q to_k "
    "to_v to_out proj_in proj_out conv_in conv_out conv_norm_out conv_shortcut time_emb_proj "
    "time_embedding add_embedding linear_1 linear_2 time_embed label_emb in_layers out_layers emb_layers "
    "skip_connection text_model text_projection self_attn q_proj k_proj v_proj out_proj layer_norm1 "
    "layer_norm2 final_layer_norm token_embedding position_embedding"
)
_PART = re.compile("(" + "|".join(sorted(_WHOLE.split(), key=len, reverse=True)) + "|[A-Za-z0-9]+)(?:_|$)")

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
_TEXT_PREFIX = {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}


def is_unet_module(path: str) -> bool:
    """Whether a path can name a module of an SDXL UNet, of any size, by diffusers' names."""
    return _UNET.fullmatch(path) is not None


def is_text_module(path: str) -> bool:
    """Whether a path can name a module of a CLIP text encoder by transformers' names."""
    return _TEXT.fullmatch(path) is not None


def text_module(path: str) -> str:
    """A text encoder's module with the level `text_model.`, which files have and transformers 5 leaves out."""
    return path if path.startswith("text_") else f"text_model.{path}"


def to_sgm(path: str, layers: int = LAYERS) -> str:
    """diffusers' module path in sgm's names, such as `up_blocks.0.attentions.1` → `output_blocks.1.1`.

    Raises:
        ValueError: the path names no module of an SDXL UNet.
    """
    if not is_unet_module(path):
        raise ValueError(f"{path!r} is no module of an SDXL UNet")
    return _to_sgm(path, layers)


def _to_sgm(path: str, layers: int) -> str:
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
    """sgm's module path in diffusers' names, such as `middle_block.1` → `mid_block.attentions.0`.

    Raises:
        ValueError: the path names no module of an SDXL UNet.
    """
    try:
        name = _from_sgm(path, layers)
    except (KeyError, ValueError, IndexError):
        name = ""
    if not is_unet_module(name):
        raise ValueError(f"{path!r} is no module of an SDXL UNet")
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
    """Whether a dotted path is spelt with sgm's names."""
    return re.match(r"(input_blocks|middle_block|output_blocks|time_embed|label_emb|out)\.", path) is not None


def unflatten(name: str) -> str:
    """A flattened name dotted again, `mid_block_attentions_0` → `mid_block.attentions.0`.

    Raises:
        ValueError: the name holds a character that no module name has.
    """
    parts, position = [], 0
    while position < len(name):
        match = _PART.match(name, position)
        if match is None:
            raise ValueError(f"{name!r} is no flattened module name")
        parts.append(match[1])
        position = match.end()
    return ".".join(parts)


def to_kohya(path: str, blocks: str = "sgm", layers: int = LAYERS) -> str:
    """kohya's name of a UNet module, `lora_unet_…`, with `blocks` "sgm" or "diffusers" inside."""
    return "lora_unet_" + (to_sgm(path, layers) if blocks == "sgm" else path).replace(".", "_")


def text_to_kohya(path: str) -> str:
    """kohya's name of a text encoder's module: `text_encoder_2.text_model.…` → `lora_te2_text_model_…`."""
    encoder, _, module = path.partition(".")
    return _TEXT_PREFIX[encoder] + module.replace(".", "_")


def unet_module(name: str, layers: int = LAYERS) -> str:
    """A dotted name of either spelling as diffusers' module path of an SDXL UNet.

    Older diffusers files say `attn1.processor.to_q` and `to_out` for `attn1.to_q` and `to_out.0`.

    Raises:
        ValueError: the name names no module of an SDXL UNet.
    """
    name = re.sub(r"\.to_out$", ".to_out.0", name.replace(".processor.", "."))
    if is_sgm(name):
        return from_sgm(name, layers)
    if not is_unet_module(name):
        raise ValueError(f"{name!r} is no module of an SDXL UNet")
    return name
