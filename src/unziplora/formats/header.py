"""The header of a LoRA file: what programs read from it (ModelSpec 1.0.1, kohya's `ss_` keys), strings only."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.metadata import version
from typing import Any

from PIL import Image

from unziplora.errors import UserError

LAYERS_KEY = "unziplora.layers_per_block"
THUMBNAIL = 256
"""Longest side of the thumbnail in pixels."""

_FULL_SIZE = {
    # Without an `sdxl_` value here A1111 takes the file for SD 1 and hides it.
    "ss_base_model_version": "sdxl_base_v1-0",
    "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
}
_SMALL = {
    # A small base of SDXL's topology: nothing that lists this file for SDXL could apply it, so it must not say so.
    "ss_base_model_version": "small-sdxl-topology",
    "modelspec.architecture": "small-sdxl-topology/lora",
}

_OURS = ("ss_network_", "sshs_", "modelspec.hash_sha256", "modelspec.implementation", "lora_adapter_metadata")


def metadata_for(
    *,
    title: str,
    trigger: str = "",
    hint: str = "",
    base: str = "",
    resolution: tuple[int, int] = (1024, 1024),
    prediction: str = "epsilon",
    zero_terminal_snr: bool = False,
    layers_per_block: int = 2,
    method: str = "",
    settings: Mapping[str, Any] | None = None,
    thumbnail: Image.Image | None = None,
    date: datetime | None = None,
) -> dict[str, str]:
    """What a person and a program want to know of a LoRA, by the keys that the programs read.

    `write_lora` adds what follows from the tensors: rank, alpha, base version, architecture and hash.

    Args:
        title: name in galleries.
        trigger: words that call it up, such as "a sks cat"; also written as a tag, where the UIs look.
        hint: one sentence on its use.
        base: the base model it was trained on.
        resolution: width and height of training in pixels.
        prediction: the base's prediction type, diffusers' name ("epsilon" or "v_prediction").
        zero_terminal_snr: the base's noise schedule ends in pure noise.
        layers_per_block: of the base's UNet; sgm's names depend on it, so it is kept where it is not SDXL's 2.
        method: how it was made.
        settings: everything it was made with, written as JSON.
        thumbnail: a picture, written as a JPEG data URL.
        date: default: now.
    """
    when = date or datetime.now(timezone.utc)
    size = f"{resolution[0]}x{resolution[1]}"
    found = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": title,
        "modelspec.resolution": size,
        "modelspec.date": when.isoformat(timespec="seconds"),
        "modelspec.prediction_type": "v" if prediction.startswith("v") else prediction,
        "modelspec.trigger_phrase": trigger,
        "modelspec.usage_hint": hint,
        "modelspec.thumbnail": data_url(thumbnail) if thumbnail else "",
        "ss_output_name": title,
        "ss_sd_model_name": base,
        "ss_v2": "False",
        "ss_resolution": f"({resolution[0]}, {resolution[1]})",
        "ss_zero_terminal_snr": str(zero_terminal_snr),
        "ss_tag_frequency": json.dumps({title: {trigger: 1}}) if trigger else "",
        "unziplora.version": version("unziplora"),
        "unziplora.method": method,
        LAYERS_KEY: str(layers_per_block) if layers_per_block != 2 else "",
        "unziplora.settings": json.dumps(settings, sort_keys=True, default=str) if settings else "",
    }
    return {key: value for key, value in found.items() if value}


def data_url(picture: Image.Image) -> str:
    """A picture as a small JPEG in a data URL."""
    small = picture.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def header(
    described: Mapping[str, str], *, ranks: set[int], alpha: float, full_size: bool, kohya: bool
) -> dict[str, str]:
    """The header of a file about to be written: what is described, and what follows from its tensors.

    Raises:
        UserError: a described value is no string (safetensors keeps nothing else).
    """
    for key, value in described.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise UserError(f"metadata {key!r}: {value!r} must be a string")
    found = {key: value for key, value in described.items() if not key.startswith(_OURS) and key != "format"}
    if full_size and not says_sdxl(found):
        found |= _FULL_SIZE  # the tensors tell what the header left out or got wrong, and A1111 goes by the header
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "ss_v2": "False",
        **(_FULL_SIZE if full_size else _SMALL),
        **found,
        "format": "pt",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models" if kohya else "diffusers",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(next(iter(ranks))) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": f"{alpha:g}",
        "ss_network_args": "{}",
    }


def says_sdxl(metadata: Mapping[str, str]) -> bool:
    """Whether a header names SDXL as the base, where A1111 looks."""
    return metadata.get("ss_base_model_version", "").startswith("sdxl")


def trigger_words(metadata: Mapping[str, str]) -> list[str]:
    """Trigger phrase and the ten most frequent tags of a header, as UIs show them."""
    words = [metadata["modelspec.trigger_phrase"]] if metadata.get("modelspec.trigger_phrase") else []
    try:
        folders = json.loads(metadata.get("ss_tag_frequency") or "{}")
        counts = [item for tags in folders.values() for item in tags.items()]
        ranked = sorted(counts, key=lambda item: -int(item[1]))
    except (ValueError, AttributeError, TypeError, OverflowError):
        return words
    return list(dict.fromkeys(words + [str(tag).strip() for tag, _ in ranked[:10]]))
