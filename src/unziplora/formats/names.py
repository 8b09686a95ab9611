"""Names of modules in LoRA files: the seam between the file layouts and the families of base models.

A name in a file is a prefix and a module's name: `unet.` or `diffusion_model.` and a dotted name, or kohya's
`lora_unet_` and a name whose dots became underscores. The prefix is the same for all families that share a layout;
the rest is the family's. `sdxl.py` contains all that is SDXL's alone. For another family, write a module with the
same functions, add its prefixes to `_PREFIXES` and choose the module by component here, and by the tensor names
(`identify.family`) in `files.read_modules`, the only other place that must tell families apart.
"""

from __future__ import annotations

import re

from unziplora.formats.sdxl import LAYERS, UNDERSCORED, is_sgm, text_module, to_sgm, unet_module

PEFT_PREFIX = "base_model.model."

_PREFIXES = {  # → (component of the pipeline, layout); the first that fits counts, so "" stays last
    "lora_unet_": ("unet", "kohya"),
    "lora_te1_": ("text_encoder", "kohya"),
    "lora_te2_": ("text_encoder_2", "kohya"),
    "lora_te_": ("text_encoder", "kohya"),
    "text_encoder.": ("text_encoder", "diffusers"),
    "text_encoder_2.": ("text_encoder_2", "diffusers"),
    "diffusion_model.": ("unet", "comfyui"),
    PEFT_PREFIX: ("unet", "peft"),
    "unet.": ("unet", "diffusers"),
    "": ("unet", "no prefix"),
}
_KOHYA_PREFIX = {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
_PART = re.compile("(" + "|".join(sorted(UNDERSCORED.split(), key=len, reverse=True)) + "|[A-Za-z0-9]+)(?:_|$)")


def parse_name(name: str, layers: int = LAYERS) -> tuple[str, str, str]:
    """Split a module's name in a file into component, diffusers' module path and layout.

    Args:
        name: the key of a tensor without the factor's suffix.
        layers: resnets per down block of the base.

    Raises:
        ValueError: the name is not a module of an SDXL UNet or of its text encoders.
    """
    prefix = next(prefix for prefix in _PREFIXES if name.startswith(prefix))
    component, layout = _PREFIXES[prefix]
    module = name.removeprefix(prefix)
    if layout == "kohya":
        module = unflatten(module)
    if component != "unet":
        return component, text_module(module), layout
    if layout == "kohya" and not is_sgm(module):
        layout = "kohya-diffusers"
    return component, unet_module(module, layers), layout


def unflatten(name: str) -> str:
    """Return a flattened name with its dots: `mid_block_attentions_0` → `mid_block.attentions.0`.

    Raises:
        ValueError: the name contains a character that no module name has.
    """
    parts, position = [], 0
    while position < len(name):
        match = _PART.match(name, position)
        if match is None:
            raise ValueError(f"{name!r} is not a flattened module name")
        parts.append(match[1])
        position = match.end()
    return ".".join(parts)


def to_kohya(path: str, blocks: str = "sgm", layers: int = LAYERS) -> str:
    """Return kohya's name of a module, such as `lora_unet_…` or `lora_te2_…`.

    Args:
        path: diffusers' path of a UNet module, or a text encoder's with `text_encoder.` or `text_encoder_2.` in front.
        blocks: whose names of UNet modules to flatten, "sgm" or "diffusers".
        layers: resnets per down block of the base, for sgm's names.
    """
    component, _, module = path.partition(".")
    if component in _KOHYA_PREFIX:
        return _KOHYA_PREFIX[component] + module.replace(".", "_")
    return "lora_unet_" + (to_sgm(path, layers) if blocks == "sgm" else path).replace(".", "_")
