"""Metadata in the header of a LoRA file, by the keys that programs read: ModelSpec 1.0.1 and kohya's `ss_…`."""

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
from unziplora.formats.sdxl import HEADER, LAYERS, SMALL_HEADER, names_sdxl
from unziplora.utils.inputs import parse_json

LAYERS_KEY = "unziplora.layers_per_block"
THUMBNAIL = 256
"""Longest side of the thumbnail in pixels."""

# Beginnings of keys that are renewed whenever a file is written.
_RENEWED = ("ss_network_", "sshs_", "modelspec.hash_sha256", "modelspec.implementation", "lora_adapter_metadata")


def metadata_for(
    *,
    title: str,
    trigger: str = "",
    hint: str = "",
    base: str = "",
    resolution: tuple[int, int] = (1024, 1024),
    prediction: str = "epsilon",
    zero_terminal_snr: bool = False,
    layers_per_block: int = LAYERS,
    method: str = "",
    settings: Mapping[str, Any] | None = None,
    thumbnail: Image.Image | None = None,
) -> dict[str, str]:
    """Return the metadata of a new LoRA; `write_lora` adds rank, alpha, base version, architecture and hash.

    Args:
        title: name in galleries.
        trigger: words that activate the LoRA, such as "a sks cat"; also written as a tag, which the UIs display.
        hint: one sentence on its use.
        base: the base model it was trained on.
        resolution: width and height of the training images in pixels.
        prediction: the base's prediction type by diffusers' name ("epsilon" or "v_prediction").
        zero_terminal_snr: the base's noise schedule ends in pure noise.
        layers_per_block: resnets per block of the base's UNet; stored unless it is SDXL's, as sgm's names need it.
        method: name of the training method.
        settings: the training settings, stored as JSON.
        thumbnail: stored as a small JPEG, which galleries show.
    """
    small = _base64(thumbnail) if thumbnail else ""
    metadata = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": title,
        "modelspec.resolution": f"{resolution[0]}x{resolution[1]}",
        "modelspec.date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "modelspec.prediction_type": "v" if prediction.startswith("v") else prediction,
        "modelspec.trigger_phrase": trigger,
        "modelspec.usage_hint": hint,
        "modelspec.thumbnail": f"data:image/jpeg;base64,{small}" if small else "",
        "ssmd_cover_images": json.dumps([small]) if small else "",  # ComfyUI, A1111 and Forge show it
        "ss_output_name": title,
        "ss_sd_model_name": base,
        "ss_v2": "False",
        "ss_resolution": f"({resolution[0]}, {resolution[1]})",
        "ss_zero_terminal_snr": str(zero_terminal_snr),
        "ss_tag_frequency": json.dumps({title: {trigger: 1}}) if trigger else "",
        "unziplora.version": version("unziplora"),
        "unziplora.method": method,
        LAYERS_KEY: str(layers_per_block) if layers_per_block != LAYERS else "",
        "unziplora.settings": json.dumps(settings, sort_keys=True, default=str) if settings else "",
    }
    return {key: value for key, value in metadata.items() if value}


def _base64(image: Image.Image) -> str:
    """Return an image as a small JPEG in base64."""
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return base64.b64encode(buffer.getvalue()).decode()


def complete_metadata(
    metadata: Mapping[str, str], *, ranks: set[int], alpha: float, full_size: bool, kohya: bool
) -> dict[str, str]:
    """Return the metadata with the entries that follow from a file's tensors and layout.

    Args:
        ranks: ranks that occur in the file.
        alpha: one for all modules.
        full_size: the file is for SDXL itself, not for a small base.
        kohya: the file has kohya's names.

    Raises:
        UserError: a key or value is not a string (safetensors stores nothing else).
    """
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise UserError(f"metadata {key!r}: {value!r} must be a string")
    entries = {key: value for key, value in metadata.items() if not key.startswith(_RENEWED) and key != "format"}
    if full_size and not names_sdxl(entries):
        entries |= HEADER  # A1111 goes by the header, and the tensors prove that it is incomplete or wrong
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "ss_v2": "False",
        **(HEADER if full_size else SMALL_HEADER),
        **entries,
        "format": "pt",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models" if kohya else "diffusers",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(next(iter(ranks))) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": f"{alpha:g}",
        "ss_network_args": "{}",
    }


def trigger_words(metadata: Mapping[str, str]) -> list[str]:
    """Return the trigger phrase and the ten most frequent tags of a header, which UIs display."""
    words = [metadata["modelspec.trigger_phrase"]] if metadata.get("modelspec.trigger_phrase") else []
    try:
        folders = parse_json(metadata.get("ss_tag_frequency") or "{}")
        counts = [item for tags in folders.values() for item in tags.items()]
        ranked = sorted(counts, key=lambda item: -int(item[1]))
    except (ValueError, AttributeError, TypeError, OverflowError):
        return words
    return list(dict.fromkeys(words + [str(tag).strip() for tag, _ in ranked[:10]]))
