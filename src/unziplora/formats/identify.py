"""Recognition of model files by first bytes, tensor names and pipeline class, so that a refusal can name the file."""

from __future__ import annotations

import re
from collections.abc import Iterable

PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
UNPICKLE = "a pickled file, which can run code when it is opened, so it never is; convert it to .safetensors"
_PROTOCOLS = tuple(bytes([0x80, protocol]) for protocol in range(2, 6))
_WEB_PAGE = "a web page, not a model: the download asked for a login; fetch it again"
_SIGNATURES = {  # first bytes of a file, in lower case
    b"version https://git-lfs": "a Git LFS pointer, not the file itself; run 'git lfs pull'",
    b"<!doctype": _WEB_PAGE,
    b"<html": _WEB_PAGE,
    b"gguf": "a GGUF file; only .safetensors files are read",
}

# The following patterns are searched in the names of tensors.
_OTHER_ADAPTERS = {  # adapters that are not a plain product B A
    r"\.hada_": "LoHa",
    r"\.lokr_": "LoKr",
    r"\.dora_scale": "DoRA",
    r"\.lora_magnitude_vector": "DoRA",
    r"\.oft_": "OFT",
    r"\.boft_": "BOFT",
    r"\.lora_mid": "LoCon with Tucker decomposition",
    r"\.lora_(B|up)\.(\w+\.)?bias$": "LoRA with bias",
    r"\.a1\.weight$": "GLoRA",
    r"\.on_input$": "IA3",
    r"\.w_norm$": "norm weights",
    r"\.diff(_b)?$": "full weight differences",
    r"\.lora_embedding_": "LoRA of an embedding",
}
LORA, CHECKPOINT = "a LoRA", "a full checkpoint"
_KINDS = {
    r"^state\.(method|phases)\.": "a checkpoint that its run continues from",
    r"^(control_model|controlnet_|zero_convs|input_hint_block)": "a ControlNet",
    r"[._]lora[._](down|up|A|B)\b|\.lora_linear_layer\.": LORA,
    r"^(model\.diffusion_model|first_stage_model|cond_stage_model|conditioner)\.": CHECKPOINT,
    r"^(emb_params$|clip_[lg]$)": "a textual inversion embedding",
    r"^(encoder|decoder)\.(down|up|mid|conv_in)": "a VAE",
    r"lora|\.alpha$|" + "|".join(_OTHER_ADAPTERS): LORA,
    r"^(down_blocks|mid_block|up_blocks)\.": "a UNet alone (plain weights)",
    r"\.weight$": "a file of plain weights",
}
_FAMILIES = {  # all but SDXL base
    r"single_transformer_blocks|double_blocks|single_blocks": "FLUX or HunyuanVideo",
    r"joint_blocks": "Stable Diffusion 3",
    r"^cond_stage_model\.model\.": "Stable Diffusion 2",
    r"^cond_stage_model\.transformer\.": "Stable Diffusion 1",
    r"^conditioner\.embedders\.0\.model\.": "the SDXL refiner",
    r"^edm_mean": "Playground 2.5 (EDM noise schedule)",
    r"^edm_vpred\.": "CosXL (EDM noise schedule)",
    r"^lora_prior_": "Stable Cascade",
    r"^(transformer|lora_transformer)[._]|^(diffusion_model\.|lora_unet_)?transformer_blocks[._]\d"
    r"|context_embedder|(attn|attn2)[._]add_[qkv]_proj": "a diffusion transformer (SD3, FLUX, Qwen-Image, LTX …)",
    r"^(diffusion_model\.|lora_unet_)?(blocks|layers|model_blocks)[._]\d+": "a video or transformer model",
}

_PIPELINES = {  # beginning of a pipeline class in diffusers
    "StableDiffusion3": "Stable Diffusion 3",
    "StableDiffusion": "Stable Diffusion 1 or 2",
    "Flux2": "FLUX.2",
    "Flux": "FLUX",
    "PixArt": "PixArt",
    "Kolors": "Kolors",
}


def other_format(start: bytes) -> str | None:
    """Return the format of a file that starts with these bytes (9 or more) if it is known and not safetensors."""
    # A safetensors file starts with the length of its header, which can look like a pickle; a brace follows.
    if start.startswith(b"PK\x03\x04") or (start[:2] in _PROTOCOLS and start[8:9] != b"{"):
        return UNPICKLE
    text = start.lstrip().lower()
    return next((meaning for signature, meaning in _SIGNATURES.items() if text.startswith(signature)), None)


def kind(names: Iterable[str]) -> str:
    """Return the kind of model file with tensors of these names, such as `CHECKPOINT` or `LORA`."""
    names = list(names)
    return _first(_KINDS, names) or ("a file of an unknown kind" if names else "a file without tensors")


def family(names: Iterable[str]) -> str | None:
    """Return the family of a checkpoint or LoRA with tensors of these names, or None if it may be SDXL."""
    return _first(_FAMILIES, list(names))


def other_adapter(names: Iterable[str]) -> tuple[str, str] | None:
    """Return the type of the first adapter that is not a plain LoRA, and its tensor's name."""
    matches = (
        (adapter, name) for name in names for pattern, adapter in _OTHER_ADAPTERS.items() if re.search(pattern, name)
    )
    return next(matches, None)


def pipeline_family(class_name: str) -> str:
    """Return the family of a diffusers pipeline class that is not SDXL's."""
    return next((family for start, family in _PIPELINES.items() if class_name.startswith(start)), f"a {class_name}")


def _first(patterns: dict[str, str], names: list[str]) -> str | None:
    """Return the meaning of the first pattern that occurs in any name."""
    return next((meaning for pattern, meaning in patterns.items() if any(re.search(pattern, n) for n in names)), None)
