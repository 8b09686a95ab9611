"""What a safetensors file is, if it is no LoRA for SDXL: told from names and shapes, to say so plainly."""

from __future__ import annotations

import re
from collections.abc import Mapping

Shapes = Mapping[str, tuple[int, ...]]

# (pattern found in a key, what it means); the first that matches speaks.
_NOT_A_LORA = (
    (r"^(model\.diffusion_model|first_stage_model|cond_stage_model|conditioner)\.", "a full checkpoint"),
    (r"^(control_model|controlnet_|zero_convs|input_hint_block)", "a ControlNet"),
    (r"^(emb_params$|clip_[lg]$)", "a textual inversion embedding"),
    (r"^(encoder|decoder)\.(down|up|mid|conv_in)", "a VAE"),
)
_OTHER_FAMILIES = (
    (r"single_transformer_blocks|double_blocks|single_blocks", "FLUX"),
    (r"joint_blocks|context_embedder|(attn|attn2)[._]add_[qkv]_proj", "SD3"),
    (r"^lora_prior_", "Stable Cascade"),
    (r"^(transformer|lora_transformer)[._]", "a diffusion transformer (SD3, FLUX, PixArt, Qwen-Image …)"),
    (r"^(diffusion_model\.|lora_unet_)?(blocks|layers|model_blocks)[._]\d+", "a video or transformer model"),
)
_ADAPTER = re.compile(r"lora|hada_|lokr_|\.alpha$|oft_|dora|\.diff(_b)?$|\.a1\.weight|\.on_input|\.w_norm")
_CROSS = re.compile(r"attn2\.to_[kv]$")
_SELF = re.compile(r"attn1\.to_[qkv]$")
_SQUARE = re.compile(r"attn1\.to_[kv]$|attn[12]\.to_(q|out\.0)$|attentions\.\d+\.proj_(in|out)$")
_SDXL_WIDTHS = {"down_blocks.1": 640, "down_blocks.2": 1280, "mid_block": 1280, "up_blocks.0": 1280, "up_blocks.1": 640}
SDXL_CROSS = 2048


def not_a_lora(names: list[str]) -> str | None:
    """What kind of file it is instead, or None where at least one key belongs to an adapter."""
    for pattern, meaning in _NOT_A_LORA:
        if any(re.search(pattern, name) for name in names):
            return meaning
    if not names:
        return "a file without tensors"
    if not any(_ADAPTER.search(name) for name in names):
        return "a file of plain weights" if any(name.endswith(".weight") for name in names) else "no model"
    return None


def other_family(names: list[str]) -> str | None:
    """The family of a LoRA whose names belong to no UNet of Stable Diffusion, or None."""
    for pattern, family in _OTHER_FAMILIES:
        if any(re.search(pattern, name) for name in names):
            return family
    return None


def unet_family(shapes: Shapes, cross: int | None = None) -> str | None:
    """The family of a UNet LoRA if it is not SDXL's, from its module paths and ΔW shapes [out, in].

    SD 1.x and 2.x have four levels and cross-attention widths of 768 and 1024; SDXL has three levels and 2048.
    A small base of SDXL's topology may have any width, so a known width of the base (`cross`) settles it.
    """
    widths = {shape[1] for path, shape in shapes.items() if _CROSS.search(path)}
    if cross is not None and cross in widths:
        return None
    levels = [int(m[1]) for path in shapes if (m := re.match(r"(?:down|up)_blocks\.(\d+)", path))]
    four = max(levels, default=0) >= 3
    hidden = {shape[0] for path, shape in shapes.items() if _CROSS.search(path) or _SELF.search(path)}
    old = bool(hidden) and hidden <= {320, 640, 1280}
    for width, family in ((768, "SD 1.x"), (1024, "SD 2.x"), (1280, "the SDXL refiner")):
        if width in widths and (four or (old and width != 1280)):
            return f"{family} (cross-attention width {width})"
    return "a UNet of four levels (SD 1.x or 2.x)" if four else None


def sdxl_sized(shapes: Shapes) -> bool:
    """Whether the transformers' layers among these modules have the widths of SDXL's own UNet."""
    for path, shape in shapes.items():
        width = next((w for block, w in _SDXL_WIDTHS.items() if path.startswith(block + ".")), 0)
        if _sdxl_shape(path, width) not in (None, shape):
            return False
    return True


def _sdxl_shape(path: str, width: int) -> tuple[int, int] | None:
    """The shape [out, in] of a transformer's layer in a block of this width; None for any other layer."""
    if _CROSS.search(path):
        return width, SDXL_CROSS
    if path.endswith("ff.net.0.proj"):
        return 8 * width, width  # GEGLU: twice four times the width
    if path.endswith("ff.net.2"):
        return width, 4 * width
    return (width, width) if _SQUARE.search(path) else None
