"""LoRA files read as dictionaries: the tensors of any layout, grouped by module.

diffusers' own reader (0.42.1) is not used here: it loses per-module alphas that differ, drops half of a file
with mixed block names, and needs the UNet's configuration. The tests compare these maps with it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from unziplora.errors import UserError
from unziplora.formats.identify import other_adapter
from unziplora.formats.names import parse_name
from unziplora.formats.sdxl import LAYERS
from unziplora.formats.writers import ADAPTER_METADATA
from unziplora.lora.algebra import Pair, shape

# `.lora_down.weight` (kohya), `.lora_A.weight` (PEFT), `.lora_A.default.weight` (PEFT, with the adapter's name),
# `.lora.down.weight` (diffusers 2023), `_lora.down.weight` (diffusers' attention processors, older),
# `.lora_linear_layer.down.weight` (text encoders, older).
_FACTOR = re.compile(
    r"(?P<module>.+?)(?:\.lora_linear_layer\.|[._]lora\.|\.lora_)(?P<part>down|up|A|B)"
    r"(?:\.(?!bias)[A-Za-z0-9_-]+)?\.weight"
)
_PARTS = {"down": "down", "A": "down", "up": "up", "B": "up"}


@dataclass(frozen=True)
class StoredFactors:
    """Factors of one module as a file stores them: A [rank, in], B [out, rank] and a strength to multiply B A by."""

    down: Tensor
    up: Tensor
    alpha: float | None = None
    strength: float = 1.0

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def pair(self) -> Pair:
        """Return the pair in fp32 with the strength folded into B."""
        return self.down.float(), self.up.float() * self.strength


@dataclass(frozen=True)
class FileModules:
    """Modules of a LoRA file: `unet` by diffusers' path, `text` by path with the encoder's name in front."""

    layout: str
    unet: dict[str, StoredFactors]
    text: dict[str, StoredFactors]

    @property
    def all(self) -> dict[str, StoredFactors]:
        return {**self.unet, **self.text}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Path of a UNet module → shape of ΔW, (out, in)."""
        return {name: shape((factors.down, factors.up))[:2] for name, factors in self.unet.items()}


def group_by_module(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], layers: int = LAYERS) -> FileModules:
    """Group the tensors of a LoRA file of any layout by module.

    Raises:
        UserError: an unknown key, an incomplete module or one that is there twice, or adapters other than LoRA.
    """
    if match := other_adapter(tensors):
        raise UserError(
            f"the file holds {match[0]} adapters (key {match[1]!r}): only plain LoRA is understood. "
            "Convert it with the tool that made it, for example by extracting a LoRA from the merged model"
        )
    modules: dict[str, dict[str, Tensor]] = {}
    names: dict[str, str] = {}
    unet_layouts: set[str] = set()
    text_layouts: set[str] = set()
    unknown = []
    for key, tensor in tensors.items():
        try:
            name, part, peft = _split_key(key)
            component, path, layout = parse_name(name, layers)
        except ValueError:
            unknown.append(key)
            continue
        module = f"{component}.{path}"
        if part != "alpha":
            if names.setdefault(module, name) != name:
                raise UserError(f"{module} is in the file twice: as {names[module]!r} and as {name!r}")
            layout = "diffusers-old" if layout == "diffusers" and not peft else layout
            (unet_layouts if component == "unet" else text_layouts).add(layout)
        if part in modules.setdefault(module, {}):
            raise UserError(
                f"{module} is in the file twice, by {key!r} and another key: two adapters in one file? "
                "Save each into a file of its own"
            )
        modules[module][part] = tensor
    if unknown:
        raise UserError(
            f"{len(unknown)} of {len(tensors)} keys are not understood, the first: {', '.join(unknown[:3])}"
        )
    layout = _layout(unet_layouts or text_layouts)
    adapter = {} if layout.startswith("kohya") else _adapter_config(metadata)
    factors = {module: _factors(module, parts, adapter) for module, parts in modules.items()}
    unet = {module.removeprefix("unet."): f for module, f in factors.items() if module.startswith("unet.")}
    return FileModules(layout, unet, {module: f for module, f in factors.items() if not module.startswith("unet.")})


def _split_key(key: str) -> tuple[str, str, bool]:
    """Split a key into the module's name and "down", "up" or "alpha", with a flag for PEFT's spelling."""
    if match := _FACTOR.fullmatch(key):
        return match["module"], _PARTS[match["part"]], match["part"] in "AB"
    if key.endswith(".alpha"):
        return key.removesuffix(".alpha"), "alpha", False
    raise ValueError(f"{key!r} is neither a factor nor an alpha")


def _layout(layouts: set[str]) -> str:
    if len(layouts) == 1:
        return layouts.pop()
    return "kohya-mixed" if layouts == {"kohya", "kohya-diffusers"} else "mixed"


def _factors(name: str, parts: dict[str, Tensor], adapter: dict[str, Any]) -> StoredFactors:
    missing = [part for part in ("down", "up") if part not in parts]
    if missing:
        raise UserError(f"{name}: the {' and '.join(missing)} matrix is missing: the file is incomplete")
    down, up = parts["down"], parts["up"]
    plain = down.dim() in (2, 4) and up.dim() == down.dim() and all(side == 1 for side in up.shape[2:])
    if not plain or not down.shape[0] == up.shape[1] > 0:
        raise UserError(f"{name}: A {list(down.shape)} and B {list(up.shape)} make no LoRA")
    if down.dim() == 4 and down.shape[2:] == up.shape[2:] == (1, 1) and not re.search(r"conv\w*$", name):
        down, up = down.flatten(1), up.flatten(1)  # a linear layer that was written as a 1×1 convolution
    rank = down.shape[0]
    if "alpha" not in parts:
        return StoredFactors(down, up, *_adapter_alpha(adapter, name, rank))
    if parts["alpha"].numel() != 1:
        raise UserError(f"{name}: alpha {list(parts['alpha'].shape)} is no single number")
    alpha = float(parts["alpha"])
    if not alpha > 0:
        # sd-scripts reads 0 as "not set", ComfyUI and diffusers as strength 0.
        raise UserError(f"{name}: alpha is {alpha:g}; programs disagree on what that means, set it right")
    return StoredFactors(down, up, alpha, alpha / rank)


def _adapter_config(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return diffusers' adapter metadata: PEFT's configuration of each component, its name in front of every key."""
    try:
        adapter = json.loads(metadata.get(ADAPTER_METADATA) or "{}")
        if "lora_alpha" in adapter:  # `unet.save_lora_adapter` writes it so, for the UNet alone
            adapter = {f"unet.{key}": value for key, value in adapter.items()}
        alphas = [value for key, value in adapter.items() if key.endswith(".lora_alpha")]
        patterns = [value for key, value in adapter.items() if key.endswith(".alpha_pattern") and value]
        alphas += [value for pattern in patterns for value in pattern.values()]
        for key in (key for pattern in patterns for key in pattern):
            re.compile(key)
        if all(float(alpha) > 0 for alpha in alphas):
            return adapter
    except (ValueError, TypeError, AttributeError, re.error):
        pass
    raise UserError(f"{ADAPTER_METADATA} in its header is not understood, so the alphas are not known")


def _adapter_alpha(adapter: dict[str, Any], name: str, rank: int) -> tuple[float | None, float]:
    """Return alpha and strength of a module by diffusers' adapter metadata.

    A missing alpha means strength 1 in all readers: sd-scripts (`create_network_from_weights`) and diffusers
    (`get_peft_kwargs`) take alpha = rank, ComfyUI and Forge a factor of 1.0.
    """
    component, _, path = name.partition(".")
    if f"{component}.lora_alpha" not in adapter:
        return None, 1.0
    alpha = float(adapter[f"{component}.lora_alpha"])
    for pattern, value in (adapter.get(f"{component}.alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):  # as peft.utils.get_pattern_key
            alpha = float(value)
            break
    return alpha, alpha / (rank**0.5 if adapter.get(f"{component}.use_rslora") else rank)
