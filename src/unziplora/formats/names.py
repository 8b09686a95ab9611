"""Names of modules in LoRA files: the seam between the file layouts and the families of base models.

A key is a prefix, a module's name and a role (`readers.py`): `unet.` and a dotted name, or kohya's `lora_unet_` and a
name whose dots became underscores. What wrapped the model in training (torch.compile, PEFT, DDP, FSDP) may be anywhere
in it. Prefixes are the same for all families that share a layout; the rest is the family's. `sdxl.py` contains all that
is SDXL's alone. For another family, write a module with the same functions, add its prefixes to `_PREFIXES` and choose
the module by component here, and by the tensor names (`identify.family`) in `files.read_modules`, the only other place
that must distinguish families.
"""

from __future__ import annotations

import re

from unziplora.formats.sdxl import LAYERS, UNDERSCORED, is_sgm, text_module, to_sgm, unet_module

_PREFIXES = {  # → (component of the pipeline, layout); the first that fits counts, so "" stays last
    "lora_unet_": ("unet", "kohya"),
    "lora_te1_": ("text_encoder", "kohya"),
    "lora_te2_": ("text_encoder_2", "kohya"),
    "lora_te_": ("text_encoder", "kohya"),
    "lycoris_unet_": ("unet", "other"),
    "lycoris_te1_": ("text_encoder", "other"),
    "lycoris_te2_": ("text_encoder_2", "other"),
    "lycoris_": ("unet", "lycoris"),  # SimpleTuner
    "text_encoder.": ("text_encoder", "diffusers"),
    "text_encoder_1.": ("text_encoder", "other"),
    "text_encoder_2.": ("text_encoder_2", "diffusers"),
    "text_encoders.clip_l.": ("text_encoder", "other"),  # ComfyUI's names, which OneTrainer writes too
    "text_encoders.clip_g.": ("text_encoder_2", "other"),
    "clip_l.": ("text_encoder", "other"),  # OneTrainer's OMI
    "clip_g.": ("text_encoder_2", "other"),
    "te1.": ("text_encoder", "other"),
    "te2.": ("text_encoder_2", "other"),
    "conditioner.embedders.0.": ("text_encoder", "other"),  # names of the original checkpoints
    "conditioner.embedders.1.": ("text_encoder_2", "other"),
    "model.diffusion_model.": ("unet", "other"),
    "diffusion_model.": ("unet", "comfyui"),
    "unet.": ("unet", "diffusers"),
    "": ("unet", "no prefix"),
}
_KOHYA_PREFIX = {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
_PART = re.compile("(" + "|".join(sorted(UNDERSCORED.split(), key=len, reverse=True)) + "|[A-Za-z0-9]+)(?:_|$)")

_WRAPPER = r"orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module|forward_module"
_WRAPPERS = re.compile(rf"(?:(?<=\.)|^)(?:_(?:{_WRAPPER})|module|base_model\.model)\.")
_FLAT_WRAPPERS = re.compile(rf"_(?:{_WRAPPER})_|^module_")
_PEFT = re.compile(r"(?:_orig_mod\.|module\.)*base_model\.model\.")


def is_peft(key: str) -> bool:
    """Return whether a key is from a PEFT model, whose alpha is in a file of its own."""
    return _PEFT.match(key) is not None


def unwrap(key: str) -> str:
    """Return a key without the parts that torch.compile, PEFT, DDP and FSDP added between dots."""
    return _WRAPPERS.sub("", key)


def parse_name(name: str, layers: int = LAYERS) -> tuple[str, str, str]:
    """Split a module's name in a file into component, diffusers' module path and layout.

    Args:
        name: the key of a tensor, unwrapped and without its role.
        layers: resnets per down block of the base.

    Raises:
        ValueError: the name is not a module of an SDXL UNet or of its text encoders.
    """
    prefix = next(prefix for prefix in _PREFIXES if name.startswith(prefix))
    component, layout = _PREFIXES[prefix]
    module = name.removeprefix(prefix)
    if flat := prefix.endswith("_"):
        module = unflatten(_FLAT_WRAPPERS.sub("", module))
    while module.startswith(f"{component}."):  # the authors of UnZipLoRA write `unet.unet.…`
        module = module.removeprefix(f"{component}.")
    if name != prefix + (module.replace(".", "_") if flat else module):
        layout = "other"
    if component != "unet":
        module = re.sub(r"^(transformer\.(?=text_model\.|encoder\.)|model\.(?=transformer\.))", "", module)
        return component, text_module(module), layout
    if layout == ("diffusers" if is_sgm(module) else "kohya"):
        layout = "other" if layout == "diffusers" else "kohya-diffusers"
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
