"""LoRA files read as dictionaries: the tensors of any layout, grouped by module.

diffusers' own reader (0.42.1) is not used here: it loses per-module alphas that differ, drops half of a file
with mixed block names, and needs the UNet's configuration. The tests hold these maps against it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from unziplora.errors import UserError
from unziplora.formats import names as keys
from unziplora.formats.writers import ADAPTER_METADATA
from unziplora.lora.algebra import Pair

PEFT_PREFIX = "base_model.model."

# `.lora_down.weight` (kohya), `.lora_A.weight` (PEFT), `.lora_A.default.weight` (PEFT, adapter named),
# `.lora.down.weight` (diffusers 2023), `_lora.down.weight` (diffusers' attention processors, older),
# `.lora_linear_layer.down.weight` (text encoders, older).
_FACTOR = re.compile(
    r"(?P<module>.+?)(?:\.lora_linear_layer\.|[._]lora\.|\.lora_)(?P<part>down|up|A|B)"
    r"(?:\.(?!bias)[A-Za-z0-9_-]+)?\.weight"
)
_DOWN = ("down", "A")

# Adapters that are not a plain product B A, by a pattern in their keys.
_OTHER_ADAPTERS = {
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "oft_": "OFT",
    "boft_": "BOFT",
    "lora_mid": "LoCon with Tucker decomposition",
    r"lora_B\.bias$": "LoRA with bias",
    r"\.a1\.weight$": "GLoRA",
    r"\.on_input$": "IA3",
    r"\.w_norm$": "norm weights",
    r"\.diff(_b)?$": "full weight differences",
    "lora_embedding_": "LoRA of an embedding",
}


@dataclass(frozen=True)
class Factors:
    """One module as the file holds it: A [rank, in], B [out, rank] and the strength that the file gives them."""

    down: Tensor
    up: Tensor
    alpha: float | None = None
    strength: float = 1.0

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def pair(self) -> Pair:
        """The pair in fp32 with the strength folded into B."""
        return self.down.float(), self.up.float() * self.strength


@dataclass(frozen=True)
class Grouped:
    """The modules of a LoRA file: `unet` by diffusers' path, `text` by path with the encoder's name before."""

    layout: str
    unet: dict[str, Factors]
    text: dict[str, Factors]


def group(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], layers: int = keys.LAYERS) -> Grouped:
    """Group the tensors of a LoRA file of any layout by module.

    Raises:
        UserError: a key is not understood, a module is incomplete or named twice, or the adapters are no LoRA.
    """
    _refuse_other_adapters(tensors)
    found: dict[tuple[str, str], dict[str, Tensor]] = {}
    names: dict[tuple[str, str], str] = {}
    layouts: dict[str, set[str]] = {"unet": set(), "text": set()}
    strange = []
    for key, tensor in tensors.items():
        parsed = _parse(key, layers)
        if parsed is None:
            strange.append(key)
            continue
        module, part, layout = parsed
        name = key.removesuffix(".alpha") if part == "alpha" else _FACTOR.fullmatch(key)["module"]  # type: ignore[index]
        if part != "alpha" and names.setdefault(module, name) != name:
            raise UserError(f"{'.'.join(module)} is in the file twice: as {names[module]!r} and as {name!r}")
        if part in found.get(module, {}):
            raise UserError(
                f"{'.'.join(module)} is in the file twice, by {key!r} and another key: two adapters in one file? "
                "Save each into a file of its own"
            )
        layouts["unet" if module[0] == "unet" else "text"].add(layout)
        found.setdefault(module, {})[part] = tensor
    if strange:
        raise UserError(
            f"{len(strange)} of {len(tensors)} keys are not understood, the first: {', '.join(strange[:3])}"
        )
    layout = _layout((layouts["unet"] or layouts["text"]) - {""})  # text encoders tell it only where they are alone
    adapter = {} if layout.startswith("kohya") else _adapter(metadata)
    unet, text = {}, {}
    for (component, path), parts in found.items():
        factors = _factors(f"{component}.{path}", parts, adapter)
        if component == "unet":
            unet[path] = factors
        else:
            text[f"{component}.{path}"] = factors
    return Grouped(layout, unet, text)


def _adapter(metadata: Mapping[str, str]) -> dict[str, Any]:
    """diffusers' adapter metadata: PEFT's configuration of each component, its name before every key."""
    try:
        adapter = json.loads(metadata.get(ADAPTER_METADATA) or "{}")
        if "lora_alpha" in adapter:  # as `unet.save_lora_adapter` writes it, for the UNet alone
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


def _refuse_other_adapters(tensors: Mapping[str, Tensor]) -> None:
    for key in tensors:
        for pattern, name in _OTHER_ADAPTERS.items():
            if re.search(pattern, key):
                raise UserError(
                    f"the file holds {name} adapters (key {key!r}): only plain LoRA is understood. "
                    "Convert it with the tool that made it, for example by extracting a LoRA from the merged model"
                )


def _parse(key: str, layers: int) -> tuple[tuple[str, str], str, str] | None:
    """A key as ((component, module path), part, layout), or None if it is not understood."""
    if match := _FACTOR.fullmatch(key):
        name, part = match["module"], "down" if match["part"] in _DOWN else "up"
        peft = match["part"] in "AB"
    elif key.endswith(".alpha"):
        name, part, peft = key.removesuffix(".alpha"), "alpha", False
    else:
        return None
    try:
        component, dotted, layout = _component(name, peft)
        if component == "unet":
            path = keys.unet_module(dotted, layers)
            if layout == "kohya" and not keys.is_sgm(dotted):
                layout = "kohya-diffusers"
        else:
            path = _text_module(dotted)
    except ValueError:
        return None
    return (component, path), part, "" if part == "alpha" else layout


def _component(name: str, peft: bool) -> tuple[str, str, str]:
    """A file's module name as (component, dotted name, layout)."""
    for prefix, component in (
        ("lora_unet_", "unet"),
        ("lora_te1_", "text_encoder"),
        ("lora_te2_", "text_encoder_2"),
        ("lora_te_", "text_encoder"),
    ):
        if name.startswith(prefix):
            return component, keys.unflatten(name.removeprefix(prefix)), "kohya"
    for component in ("text_encoder", "text_encoder_2"):
        if name.startswith(component + "."):
            return component, name.removeprefix(component + "."), "diffusers" if peft else "diffusers-old"
    if name.startswith("diffusion_model."):
        return "unet", name.removeprefix("diffusion_model."), "comfyui"
    if name.startswith(PEFT_PREFIX):
        return "unet", name.removeprefix(PEFT_PREFIX), "peft"
    if name.startswith("unet."):
        return "unet", name.removeprefix("unet."), "diffusers" if peft else "diffusers-old"
    return "unet", name, "no prefix"


def _text_module(name: str) -> str:
    """A text encoder's module by transformers' name, with `text_model.` before the layers."""
    for new, old in (("q_proj", "to_q"), ("k_proj", "to_k"), ("v_proj", "to_v"), ("out_proj", "to_out")):
        name = re.sub(rf"\.{old}$", f".{new}", name)
    if not keys.is_text_module(name):
        raise ValueError(f"{name!r} is no module of a CLIP text encoder")
    return keys.text_module(name)


def _layout(found: set[str]) -> str:
    if len(found) == 1:
        return found.pop()
    if found == {"kohya", "kohya-diffusers"}:
        return "kohya-mixed"
    return "mixed"


def _factors(name: str, parts: dict[str, Tensor], adapter: dict[str, Any]) -> Factors:
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
    if "alpha" in parts:
        if parts["alpha"].numel() != 1:
            raise UserError(f"{name}: alpha {list(parts['alpha'].shape)} is no single number")
        alpha = float(parts["alpha"])
        if not alpha > 0:
            # sd-scripts reads 0 as "not set", ComfyUI and diffusers as strength 0.
            raise UserError(f"{name}: alpha is {alpha:g}; programs disagree on what that means, set it right")
        return Factors(down, up, alpha, alpha / rank)
    return Factors(down, up, *_adapter_alpha(adapter, name, rank))


def _adapter_alpha(adapter: dict[str, Any], name: str, rank: int) -> tuple[float | None, float]:
    """Alpha and strength of a module by diffusers' adapter metadata.

    A missing alpha means strength 1 for all readers: sd-scripts (`create_network_from_weights`) and diffusers
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
