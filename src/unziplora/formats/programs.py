"""Programs that load LoRA files, and their verdict on a file by its layout and header."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from unziplora.formats.readers import FileModules
from unziplora.formats.sdxl import names_sdxl
from unziplora.formats.writers import ADAPTER_METADATA

Answer = Literal["yes", "partly", "no", "unknown"]


class Verdict(BaseModel):
    """Answer to the question if a program loads a file, with the reason."""

    answer: Answer
    reason: str


PROGRAMS = ("ComfyUI", "Forge", "A1111", "InvokeAI", "diffusers", "sd-scripts")

# Checked by running the key code of ComfyUI, InvokeAI and diffusers, and by reading that of the others (2025–2026).
_KOHYA: dict[str, tuple[Answer, str]] = {
    "ComfyUI": ("yes", "all modules"),
    "Forge": ("yes", "all modules"),
    "A1111": ("yes", "all modules"),
    "InvokeAI": ("yes", "all modules"),
    "diffusers": ("yes", "load_lora_weights"),
}
_BY_LAYOUT: dict[str, dict[str, tuple[Answer, str]]] = {
    "kohya": {**_KOHYA, "sd-scripts": ("yes", "its own layout")},
    "kohya-diffusers": {**_KOHYA, "sd-scripts": ("partly", "knows the block names of sgm, not these")},
    "kohya-mixed": {
        **_KOHYA,
        "InvokeAI": ("no", "raises: block names of two kinds"),
        "diffusers": ("partly", "drops the modules with block names of sgm"),
        "sd-scripts": ("no", "block names of two kinds"),
    },
    "diffusers": {
        "Forge": ("no", "refuses diffusers' names"),
        "A1111": ("no", "applies nothing, without an error"),
        "InvokeAI": ("no", "raises ValueError"),
        "diffusers": ("yes", "its own layout"),
        "sd-scripts": ("no", "knows only kohya's names"),
    },
    "diffusers-old": {"diffusers": ("yes", "an older layout of its own")},
    "peft": {"diffusers": ("no", "loads nothing: the names lack the prefix 'unet.'")},
    "no prefix": {"diffusers": ("no", "loads nothing: the names lack the prefix 'unet.'")},
}


def verdicts_on(modules: FileModules, full_size: bool, metadata: dict[str, str]) -> dict[str, Verdict]:
    """Return each program's verdict on a file.

    Args:
        modules: the file's modules.
        full_size: they have the widths of SDXL itself.
        metadata: the file's header.
    """
    verdicts = dict(_BY_LAYOUT.get(modules.layout, {}))
    if modules.layout == "diffusers":
        verdicts["ComfyUI"] = _comfyui(list(modules.unet))
    if modules.layout.startswith("kohya"):
        if not names_sdxl(metadata):
            verdicts["A1111"] = ("partly", "hidden as SD 1: the header lacks ss_base_model_version = sdxl_…")
        if len({factors.alpha for factors in modules.unet.values()}) > 1 and verdicts["diffusers"][0] == "yes":
            verdicts["diffusers"] = ("partly", "alphas differ: attention modules load at a wrong strength")
        added = [path for path in modules.unet if path.startswith("add_embedding.")]
        if added and modules.layout == "kohya-diffusers":
            verdicts["diffusers"] = ("partly", f"drops {len(added)} modules of add_embedding, without an error")
        if ADAPTER_METADATA in metadata:
            verdicts["diffusers"] = ("no", f"raises: kohya names with {ADAPTER_METADATA} in the header")
    if not full_size:
        small: tuple[Answer, str] = ("no", "made for a small base, which this program does not open")
        verdicts.update({name: small for name in PROGRAMS if name != "diffusers"})
    unknown: tuple[Answer, str] = ("unknown", "this layout was not checked; convert it to kohya names")
    answers = {name: verdicts.get(name, unknown) for name in PROGRAMS}
    return {name: Verdict(answer=answer, reason=reason) for name, (answer, reason) in answers.items()}


def _comfyui(paths: list[str]) -> tuple[Answer, str]:
    """Return ComfyUI's verdict: it reads diffusers' attention modules by their old names only, `….processor.to_q`."""
    attention = sum(".attn" in path for path in paths)
    if not attention:
        return "yes", "all modules"
    answer: Answer = "partly" if len(paths) > attention else "no"
    return answer, f"drops {attention} attention modules of {len(paths)}, without an error"
