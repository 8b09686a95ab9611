"""LoRA files written as dictionaries: modules spelt out by the names of a layout."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from unziplora.formats import names as keys
from unziplora.lora.algebra import Pair

ADAPTER_METADATA = "lora_adapter_metadata"
"""Header key in which diffusers keeps rank and alpha of its own layout (and of no other: it raises)."""


Fit = Callable[[Pair], Pair]
"""What makes a pair fit the numbers that it is stored in, ΔW unchanged."""


def kohya(
    pairs: Mapping[str, Pair], alpha: float, blocks: str = "sgm", layers: int = keys.LAYERS, fit: Fit | None = None
) -> dict[str, Tensor]:
    """UNet and text encoder modules by kohya's names, one alpha for all: B is multiplied by rank / alpha.

    Args:
        pairs: UNet modules by diffusers' path, those of text encoders by `text_encoder…` path.
        alpha: written for every module.
        blocks: "sgm" or "diffusers" spelling inside the names.
        layers: resnets per down block of the base, for sgm's.
        fit: applied to every pair as it is written.
    """
    tensors = {}
    for path, (down, up) in pairs.items():
        text = path.startswith("text_encoder")
        name = keys.text_to_kohya(path) if text else keys.to_kohya(path, blocks, layers)
        tensors[f"{name}.alpha"] = torch.tensor(float(alpha))
        written = down, up * (down.shape[0] / alpha)
        tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = fit(written) if fit else written
    return tensors


def diffusers(pairs: Mapping[str, Pair], alpha: float | None, fit: Fit | None = None) -> tuple[dict[str, Tensor], str]:
    """All modules by diffusers/PEFT's names, and the adapter metadata (JSON) that keeps ranks and alpha.

    Without a chosen alpha each module's is its rank: right also for readers that know no adapter metadata.
    """
    tensors: dict[str, Tensor] = {}
    adapter: dict[str, Any] = {}
    ranks: dict[str, dict[str, int]] = {}
    for path, (down, up) in pairs.items():
        name = path if path.startswith("text_encoder") else f"unet.{path}"
        rank = down.shape[0]
        written = down, up if alpha is None else up * (rank / alpha)
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = fit(written) if fit else written
        component, _, module = name.partition(".")
        # transformers 5 has no `text_model.` level, 4 has; PEFT matches the ends of names, so leave it out.
        ranks.setdefault(component, {})[module.removeprefix("text_model.")] = rank
    for component, by_module in ranks.items():
        common = max(set(by_module.values()), key=lambda rank: (list(by_module.values()).count(rank), rank))
        pattern = {module: rank for module, rank in by_module.items() if rank != common}
        adapter[f"{component}.r"] = common
        adapter[f"{component}.lora_alpha"] = common if alpha is None else alpha
        adapter[f"{component}.target_modules"] = sorted(by_module)
        adapter[f"{component}.rank_pattern"] = pattern
        adapter[f"{component}.alpha_pattern"] = pattern if alpha is None else {}
    return tensors, json.dumps(adapter, sort_keys=True)
