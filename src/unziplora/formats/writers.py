"""LoRA files written as dictionaries: pairs of matrices by the names of a layout."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from unziplora.formats.names import to_kohya
from unziplora.formats.sdxl import LAYERS
from unziplora.lora.algebra import Pair

ADAPTER_METADATA = "lora_adapter_metadata"
"""Header key in which diffusers stores rank and alpha of its own layout (and of no other: it raises)."""


def kohya(pairs: Mapping[str, Pair], alpha: float, blocks: str = "sgm", layers: int = LAYERS) -> dict[str, Tensor]:
    """Return the tensors of a file with kohya's names and one alpha for all modules.

    Args:
        pairs: pairs that programs will multiply by alpha / rank: UNet modules by diffusers' path, text encoder modules
            by path with the encoder's name in front.
        alpha: written for every module.
        blocks: block names, "sgm" or "diffusers".
        layers: resnets per down block of the base, for sgm's block names.
    """
    tensors = {}
    for path, (down, up) in pairs.items():
        name = to_kohya(path, blocks, layers)
        tensors[f"{name}.alpha"] = torch.tensor(float(alpha))
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    return tensors


def diffusers(pairs: Mapping[str, Pair], alpha: float | None) -> tuple[dict[str, Tensor], str]:
    """Return the tensors of a file with diffusers' (PEFT's) names, and its adapter metadata: ranks and alpha as JSON.

    Args:
        pairs: see `kohya`.
        alpha: one for all modules. With None each module's alpha is its rank, so that programs that ignore the
            adapter metadata apply the right strength.
    """
    tensors: dict[str, Tensor] = {}
    adapter: dict[str, Any] = {}
    ranks: dict[str, dict[str, int]] = {}
    for path, (down, up) in pairs.items():
        name = path if path.startswith("text_encoder") else f"unet.{path}"
        tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        component, _, module = name.partition(".")
        # transformers 4 has a level `text_model.`, 5 has not; PEFT matches the ends of names, so leave it out.
        ranks.setdefault(component, {})[module.removeprefix("text_model.")] = down.shape[0]
    for component, by_module in ranks.items():
        common = max(Counter(by_module.values()).items(), key=lambda item: item[::-1])[0]
        pattern = {module: rank for module, rank in by_module.items() if rank != common}
        adapter[f"{component}.r"] = common
        adapter[f"{component}.lora_alpha"] = common if alpha is None else alpha
        adapter[f"{component}.target_modules"] = sorted(by_module)
        adapter[f"{component}.rank_pattern"] = pattern
        adapter[f"{component}.alpha_pattern"] = pattern if alpha is None else {}
    return tensors, json.dumps(adapter, sort_keys=True)
