"""Programs that load LoRA files, and their verdict on a file by its layout and header."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

from pydantic import BaseModel

from unziplora.formats.readers import FileModules
from unziplora.formats.sdxl import names_sdxl
from unziplora.formats.writers import ADAPTER_METADATA

Answer = Literal["yes", "partly", "no", "unknown"]
_Reasoned = tuple[Answer, str]


class Verdict(BaseModel):
    """Answer to the question if a program loads a file, with the reason."""

    answer: Answer
    reason: str


ENCODERS = ("text_encoder", "text_encoder_2")
PROGRAMS = ("ComfyUI", "Forge", "A1111", "InvokeAI", "diffusers", "sd-scripts")

# Checked by running the key code of ComfyUI, InvokeAI and diffusers, and by reading that of the others (2025–2026).
_KOHYA: dict[str, _Reasoned] = {
    "ComfyUI": ("yes", "all modules"),
    "Forge": ("yes", "all modules"),
    "A1111": ("yes", "all modules"),
    "InvokeAI": ("yes", "all modules"),
    "diffusers": ("yes", "load_lora_weights"),
}
_BY_LAYOUT: dict[str, dict[str, _Reasoned]] = {
    "kohya": {**_KOHYA, "sd-scripts": ("yes", "its own layout")},
    "kohya-diffusers": {**_KOHYA, "sd-scripts": ("partly", "reads the block names of sgm, not these")},
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
        "sd-scripts": ("no", "reads only kohya's names"),
    },
    "diffusers-old": {"diffusers": ("yes", "an older layout of its own")},
    "peft": {"diffusers": ("no", "loads nothing: the names lack the prefix 'unet.'")},
    "no prefix": {"diffusers": ("no", "loads nothing: the names lack the prefix 'unet.'")},
}


_SMALL: _Reasoned = ("no", "made for a small base, which this program does not open")
_UNCHECKED: _Reasoned = ("unknown", "this layout was not checked; convert it to kohya names")
_BROKEN: _Reasoned = ("no", "contains NaN or infinity, which makes every image black")


def verdicts_on(
    modules: FileModules, full_size: bool, metadata: Mapping[str, str], keys: Iterable[str], finite: bool
) -> dict[str, Verdict]:
    """Return each program's verdict on a file.

    Args:
        modules: the file's modules.
        full_size: they have the widths of SDXL itself.
        metadata: the file's header.
        keys: names of the file's tensors.
        finite: no tensor contains NaN or infinity.
    """
    verdicts: dict[str, _Reasoned] = dict(_BY_LAYOUT.get(modules.layout, {}))
    if modules.layout == "diffusers":
        verdicts["ComfyUI"] = _comfyui(list(modules.unet))
    if modules.layout.startswith("kohya") and not names_sdxl(metadata):
        verdicts["A1111"] = ("partly", "hidden as SD 1: the header lacks ss_base_model_version = sdxl_…")
    if verdicts.get("diffusers", _BROKEN)[0] == "yes":
        kohya = modules.layout.startswith("kohya")
        verdicts["diffusers"] = (
            _diffusers_refuses(modules, metadata, list(keys), kohya)
            or (_diffusers_drops(modules) if kohya else None)
            or verdicts["diffusers"]
        )
    if not full_size:
        verdicts.update({name: _SMALL for name in PROGRAMS if name != "diffusers"})
    answers = {name: verdicts.get(name, _UNCHECKED) if finite else _BROKEN for name in PROGRAMS}
    return {name: Verdict(answer=answer, reason=reason) for name, (answer, reason) in answers.items()}


def _comfyui(paths: list[str]) -> _Reasoned:
    """Return ComfyUI's verdict: it reads diffusers' attention modules by their old names only, `….processor.to_q`."""
    attention = sum(".attn" in path for path in paths)
    if not attention:
        return "yes", "all modules"
    answer: Answer = "partly" if len(paths) > attention else "no"
    return answer, f"drops {attention} attention modules of {len(paths)}, without an error"


def _diffusers_refuses(
    modules: FileModules, metadata: Mapping[str, str], keys: list[str], kohya: bool
) -> _Reasoned | None:
    """Return the verdict of diffusers on a file for which it raises; the tests compare it with its own loader."""
    if kohya and ADAPTER_METADATA in metadata:
        return "no", f"raises: kohya names with {ADAPTER_METADATA} in the header"
    if modules.unread or (not kohya and any(key.endswith(".alpha") for key in keys)):
        return "no", "raises: there are tensors besides the two matrices of each module"
    for encoder in ENCODERS:
        paths = modules.text_of(encoder)
        known = ("out_proj", "mlp.") if kohya else (".self_attn.",)
        if paths and not any(part in path for path in paths for part in known):
            missing = "out_proj or mlp" if kohya else "attention modules"
            return "no", f"raises: its part for {encoder} has no {missing}"
    return None


def _diffusers_drops(modules: FileModules) -> _Reasoned | None:
    """Return the verdict of diffusers on a file with kohya's names of which it drops or changes something."""
    dropped = [path for path in modules.unet if path.startswith("add_embedding.")]
    dropped = dropped if modules.layout == "kohya-diffusers" else []
    for encoder in ENCODERS:
        attention = [path for path in modules.text_of(encoder) if ".self_attn." in path]
        if not any(path.endswith("out_proj") for path in attention):
            dropped += attention
    if dropped:
        answer: Answer = "partly" if len(dropped) < len(modules.all) else "no"
        return answer, f"drops {len(dropped)} modules, such as {dropped[0]}, without an error"
    parts = [modules.unet.values(), *(modules.text_of(encoder).values() for encoder in ENCODERS)]
    if any(len({factors.alpha for factors in part}) > 1 for part in parts):
        return "partly", "alphas differ: attention modules load at a wrong strength"
    return None
