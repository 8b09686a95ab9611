"""Images saved as PNG files with the settings of `unziplora sample` inside, and ComfyUI's own workflow."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from unziplora.config.recipe import resolve
from unziplora.config.sample import SampleConfig
from unziplora.errors import UserError
from unziplora.formats.safetensors import body_hash
from unziplora.models.text import Prompts
from unziplora.sampling.sample import settings_text
from unziplora.sampling.session import shared_names

from .pair import Pair


def recipe(pair: Pair, image: Image.Image, base: str, prompts: Prompts, seed: int, **settings: Any) -> dict[str, str]:
    """Return the PNG text entries of an image: the same as those of `unziplora sample`.

    Args:
        settings: keys of `SampleConfig`: negative, steps, guidance, scheduler.

    Raises:
        UserError: an image with a prompt for each LoRA lacks one, or a setting is not one of `unziplora sample`.
    """
    keys: dict[str, Any] = {**settings, "prompts": [prompts.full], "mode": "separate" if pair.two_prompts else "direct"}
    for kind, part in pair.parts.items():
        keys |= {kind: part.source.file, f"{kind}_strength": part.strength, f"{kind}_blocks": list(part.blocks)}
    config = resolve(SampleConfig, keys)
    sources = {kind: part.source for kind, part in pair.parts.items()}
    names = shared_names(source.file for source in sources.values())
    kinds = {kind: names[source.file] for kind, source in sources.items()}
    hashes = {
        kinds[kind]: source.header.get("sshs_model_hash") or body_hash(source.file) for kind, source in sources.items()
    }
    text = settings_text(config, base, settings["guidance"], hashes, kinds, prompts, image.size, seed)
    if pair.projection:
        own = {**json.loads(text["unziplora"]), "projection": pair.projection}
        text["unziplora"] = json.dumps(own, sort_keys=True, ensure_ascii=False)
    return text


def prompts_of(pair: Pair, full: str, content: str, style: str) -> Prompts:
    """Return the prompts that an image was made with: three if each LoRA read its own.

    Raises:
        UserError: one is empty.
    """
    if not full.strip():
        raise UserError("prompt is empty: connect the text that the image was made with")
    if not pair.two_prompts:
        return Prompts(full)
    return Prompts(full, content, style)


def workflow_text(prompt: Any, extra: Mapping[str, Any] | None) -> dict[str, str]:
    """Return ComfyUI's own PNG text entries, by which it opens the graph of an image."""
    entries = {"prompt": prompt} if prompt else {}
    return {name: json.dumps(value) for name, value in {**entries, **(extra or {})}.items()}


def model_name(prompt: Mapping[str, Any] | None) -> str:
    """Return the name of the checkpoint in a graph, without folders; an empty text if there is none, or several."""
    values = [node.get("inputs", {}).get("ckpt_name") for node in (prompt or {}).values()]
    names = {value for value in values if isinstance(value, str)}  # a link to another node is a list
    return Path(names.pop().replace("\\", "/")).stem if len(names) == 1 else ""
