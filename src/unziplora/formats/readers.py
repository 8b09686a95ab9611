"""LoRA files read as dictionaries: the tensors of any layout, grouped by module.

diffusers' own reader (0.42.1) is not used here: it loses per-module alphas that differ, drops half of a file
with mixed block names, and needs the UNet's configuration. The tests compare these maps with it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from torch import Tensor

from unziplora.errors import UserError
from unziplora.formats.adapter_config import AdapterConfig
from unziplora.formats.identify import other_adapter
from unziplora.formats.names import is_peft, parse_name, unwrap
from unziplora.formats.sdxl import FUSED, LAYERS
from unziplora.lora.algebra import Pair, shape

# `.lora_down.weight` (kohya), `.lora_A.weight` (PEFT), `.lora_A.default.weight` (PEFT, with the adapter's name),
# `.lora.down.weight` (diffusers 2023), `_lora.down.weight` (diffusers' attention processors, older),
# `.lora_linear_layer.down.weight` (text encoders, older).
_FACTOR = re.compile(
    r"(?:\.lora_linear_layer\.|[._]lora\.|\.lora_)(?P<part>down|up|A|B)(?:(?:\.(?!bias)[\w-]+)?\.weight)?\Z"
)
_ALPHA = re.compile(r"(?:[._]lora|\.lora_linear_layer)?\.alpha\Z")
_ENDINGS = {  # of the layouts that programs know by name
    **dict.fromkeys(("kohya", "kohya-diffusers"), r"\.lora_(down|up)\.weight"),
    "diffusers": r"\.lora_[AB]\.weight",
    "diffusers-old": r"([._]lora|\.lora_linear_layer)\.(down|up)\.weight",
}
_EMBEDDING = "bundle_emb."
"""Beginning of the keys of an embedding that OneTrainer or kohya's trainer stores with a LoRA."""

_PARTS = {"down": "down", "A": "down", "up": "up", "B": "up"}
_LONGEST_KEY = 500

T = TypeVar("T")


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
    """Modules of a LoRA file: `unet` by diffusers' path, `text` by path with the encoder's name in front.

    Attributes:
        unread: keys that belong to no module, such as those of an embedding that is stored with the LoRA.
    """

    layout: str
    unet: dict[str, StoredFactors]
    text: dict[str, StoredFactors]
    unread: list[str] = field(default_factory=list)

    @property
    def all(self) -> dict[str, StoredFactors]:
        return {**self.unet, **self.text}

    def text_of(self, encoder: str) -> dict[str, StoredFactors]:
        """Return the modules of one text encoder, `text_encoder` or `text_encoder_2`."""
        return {path: factors for path, factors in self.text.items() if path.startswith(f"{encoder}.")}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Path of a UNet module → shape of ΔW, (out, in)."""
        return {name: shape((factors.down, factors.up))[:2] for name, factors in self.unet.items()}


def group_by_module(
    tensors: Mapping[str, Tensor], configs: Mapping[str, AdapterConfig] | None = None, layers: int = LAYERS
) -> FileModules:
    """Group the tensors of a LoRA file of any layout by module.

    Args:
        tensors: tensors by key.
        configs: PEFT's configuration of each component, for modules whose alpha is not among the tensors.
        layers: resnets per down block of the base.

    Raises:
        UserError: an incomplete module or one that is there twice, a key of a module that is not understood, or
            adapters other than LoRA.
    """
    if match := other_adapter(tensors):
        raise UserError(
            f"the file contains {match[0]} adapters (key {shown(match[1:])}): only plain LoRA is understood. "
            "Convert it with the tool that made it, for example by extracting a LoRA from the merged model"
        )
    modules, layout, unread = _collect(tensors, layers)
    if unknown := [key for key in unread if _is_of_the_model(key, layers)]:
        raise UserError(f"{len(unknown)} of {len(tensors)} keys are not understood, the first: {shown(unknown[:3])}")
    if not modules:
        raise UserError("the file has no module of SDXL")
    factors: dict[str, StoredFactors] = {}
    for module, parts in modules.items():
        for name, stored in _unfused(module, _factors(module, parts, configs or {})):
            if name in factors:
                raise UserError(f"{name} is in the file twice: alone and with others in one matrix")
            factors[name] = stored
    unet = {module.removeprefix("unet."): f for module, f in factors.items() if module.startswith("unet.")}
    text = {module: f for module, f in factors.items() if not module.startswith("unet.")}
    return FileModules(layout, unet, text, unread)


def _collect(tensors: Mapping[str, Tensor], layers: int) -> tuple[dict[str, dict[str, Tensor]], str, list[str]]:
    """Return the tensors of each module by role, the layout, and the keys that belong to no module."""
    modules: dict[str, dict[str, Tensor]] = {}
    names: dict[str, str] = {}
    layouts: dict[bool, set[str]] = {True: set(), False: set()}  # of the UNet, of the text encoders
    unread = []
    for key, tensor in tensors.items():
        try:
            name, role, ending = _split_key(unwrap(key))
            component, path, layout = parse_name(name, layers)
        except ValueError:
            unread.append(key)
            continue
        module = f"{component}.{path}"
        if role != "alpha":
            if names.setdefault(module, name) != name:
                raise UserError(f"{module} is in the file twice: as {names[module]!r} and as {name!r}")
            layout = "peft" if is_peft(key) else "other" if unwrap(key) != key else _spelled(layout, ending)
            layouts[component == "unet"].add(layout)
        if role in modules.setdefault(module, {}):
            raise UserError(
                f"{module} is in the file twice, by {key!r} and another key: two adapters in one file? "
                "Save each into a file of its own"
            )
        modules[module][role] = tensor
    return modules, _layout(layouts[True], layouts[False]), unread


def split_embeddings(tensors: Mapping[str, T]) -> tuple[dict[str, T], list[str]]:
    """Return a file's tensors without its embeddings, whose names may look like anything, and the embeddings' keys."""
    embeddings = [key for key in tensors if key.startswith(_EMBEDDING)]
    return {key: tensor for key, tensor in tensors.items() if key not in embeddings}, embeddings


def is_factor(key: str) -> bool:
    """Return whether a key is that of an A or a B."""
    return bool(_FACTOR.search(key)) and not key.startswith(_EMBEDDING)


def shown(keys: Sequence[str]) -> str:
    """Return keys for a message: shortened, and with control characters escaped."""
    return ", ".join(repr(key if len(key) <= 120 else key[:120] + "…") for key in keys)


def _spelled(layout: str, ending: str) -> str:
    """Return the layout of a key by its ending too: each program reads one spelling only."""
    if layout == "diffusers" and re.fullmatch(_ENDINGS["diffusers-old"], ending):
        return "diffusers-old"
    return layout if re.fullmatch(_ENDINGS.get(layout, ".*"), ending) else "other"


def _split_key(key: str) -> tuple[str, str, str]:
    """Split a key into the module's name and its role, "down", "up" or "alpha", and return how it ends."""
    if len(key) <= _LONGEST_KEY:
        if match := _FACTOR.search(key):
            return key[: match.start()], _PARTS[match["part"]], match[0]
        if match := _ALPHA.search(key):
            return key[: match.start()], "alpha", match[0]
    raise ValueError("neither a factor nor an alpha")


def _is_of_the_model(key: str, layers: int) -> bool:
    """Return whether an unread key may change the base: it is named after an adapter, or after a module of SDXL."""
    if re.search(r"lora|lycoris|\.alpha$", key, re.IGNORECASE):
        return True
    name = unwrap(key)[:_LONGEST_KEY]
    for _ in range(2):
        name = name.rpartition(".")[0]
        try:
            parse_name(name, layers)
        except ValueError:
            continue
        return True
    return False


def _layout(unet: set[str], text: set[str]) -> str:
    """Return the one layout of a file; kohya's names of text encoders go with both of its names of blocks."""
    layouts = unet | (text - {"kohya"} if unet & {"kohya", "kohya-diffusers"} else text)
    if len(layouts) == 1:
        return layouts.pop()
    return "kohya-mixed" if layouts == {"kohya", "kohya-diffusers"} else "mixed"


def _factors(name: str, parts: dict[str, Tensor], configs: Mapping[str, AdapterConfig]) -> StoredFactors:
    missing = [part for part in ("down", "up") if part not in parts]
    if missing:
        raise UserError(f"{name}: the {' and '.join(missing)} matrix is missing: the file is incomplete")
    down, up = parts["down"], parts["up"]
    plain = down.dim() in (2, 4) and up.dim() == down.dim() and all(side == 1 for side in up.shape[2:])
    if not plain or not down.shape[0] == up.shape[1] > 0 or not down.numel() or not up.numel():
        raise UserError(f"{name}: A {list(down.shape)} and B {list(up.shape)} make no LoRA")
    if not down.is_floating_point() or not up.is_floating_point():
        raise UserError(
            f"{name}: the matrices contain integers, as in a quantized file; take the fp16, bf16 or fp32 file"
        )
    if down.dim() == 4 and down.shape[2:] == up.shape[2:] == (1, 1) and not re.search(r"conv\w*$", name):
        down, up = down.flatten(1), up.flatten(1)  # a linear layer that was written as a 1×1 convolution
    rank = down.shape[0]
    if "alpha" in parts:
        alpha = _alpha(name, parts["alpha"])
        return StoredFactors(down, up, alpha, alpha / rank)
    component, _, path = name.partition(".")
    if config := configs.get(component):
        return StoredFactors(down, up, config.alpha_of(path), config.strength(path, rank))
    # A missing alpha means strength 1 in all readers: sd-scripts (`create_network_from_weights`) and diffusers
    # (`get_peft_kwargs`) take alpha = rank, ComfyUI and Forge a factor of 1.0.
    return StoredFactors(down, up)


def _alpha(name: str, tensor: Tensor) -> float:
    if tensor.numel() != 1 or tensor.is_complex():
        raise UserError(f"{name}: alpha {list(tensor.shape)} is not a single number")
    alpha = float(tensor)
    if not 0 < alpha < math.inf:
        # sd-scripts reads 0 as "not set", ComfyUI and diffusers as strength 0.
        raise UserError(f"{name}: alpha is {alpha:g}; programs disagree on what that means, set it right")
    return alpha


def _unfused(name: str, factors: StoredFactors) -> Iterator[tuple[str, StoredFactors]]:
    """Yield a module, or the three that OpenCLIP has in one matrix: they share A, and B is cut into three."""
    if not name.endswith(FUSED):
        yield name, factors
        return
    if factors.up.shape[0] % 3:
        raise UserError(f"{name}: {factors.up.shape[0]} outputs are not queries, keys and values of one size")
    for letter, up in zip("qkv", factors.up.chunk(3), strict=True):
        yield f"{name.removesuffix(FUSED)}self_attn.{letter}_proj", replace(factors, up=up)
