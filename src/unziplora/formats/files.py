"""Reading and writing LoRA files: any layout in, every fault named, nothing half-written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from unziplora.errors import UserError
from unziplora.formats import families
from unziplora.formats import names as keys
from unziplora.formats import writers as layouts
from unziplora.formats.header import LAYERS_KEY, header
from unziplora.formats.readers import PEFT_PREFIX, Grouped, group
from unziplora.formats.safetensors import open_tensors, write_safetensors
from unziplora.lora.algebra import balanced, shape
from unziplora.lora.weights import Lora, text_tensors

Layout = Literal["kohya", "kohya-diffusers", "diffusers"]
LAYOUTS: tuple[Layout, ...] = ("kohya", "kohya-diffusers", "diffusers")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def read_lora(path: str | Path, unet_config: Mapping[str, Any] | None = None) -> Lora:
    """Read a LoRA for an SDXL-topology UNet from a file of any layout.

    Args:
        path: a .safetensors file.
        unet_config: the base UNet's configuration, if known: settles doubts about small bases.

    Raises:
        UserError: no such file, not a safetensors file, broken, for another family, not a plain LoRA.
        MachineError: the file cannot be read.
    """
    path = Path(path)
    tensors, metadata = open_tensors(path)
    grouped = understand(path, tensors, metadata, unet_config)
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor.float()).all()]
    if broken:
        raise UserError(
            f"{path}: {len(broken)} tensors hold NaN or infinity, the first: {broken[0]}. "
            "The training had diverged or overflowed; take an earlier checkpoint"
        )
    text = {name: factors.pair() for name, factors in grouped.text.items()}
    modules = {name: factors.pair() for name, factors in grouped.unet.items()}
    alphas = {factors.alpha for factors in (*grouped.unet.values(), *grouped.text.values())}
    return Lora(modules, metadata, text_tensors(text), alphas.pop() if len(alphas) == 1 else None)


def understand(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    unet_config: Mapping[str, Any] | None = None,
) -> Grouped:
    """Group a file's tensors by module, or say what the file is instead.

    Raises:
        UserError: it is no LoRA for an SDXL-topology UNet.
    """
    names = list(tensors)
    if kind := families.not_a_lora(names):
        raise UserError(f"{path}: this is {kind}, not a LoRA")
    if family := families.other_family(names):
        raise UserError(f"{path}: this LoRA is for {family}, not for SDXL")
    config = dict(unet_config or {})
    try:
        metadata = {**metadata, **_peft_config(path, names)}
        grouped = group(tensors, metadata, _layers(metadata, config))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    shapes = {name: shape((factors.down, factors.up))[:2] for name, factors in grouped.unet.items()}
    family = families.unet_family(shapes, config.get("cross_attention_dim"))
    if family and "unziplora.version" not in metadata:  # our own files are for SDXL's topology, whatever its widths
        raise UserError(f"{path}: this LoRA is for {family}, not for SDXL")
    return grouped


def _layers(metadata: Mapping[str, str], config: Mapping[str, Any]) -> int:
    """Resnets per block, which sgm's names depend on: 2 as in SDXL, unless the file or the base says otherwise."""
    if LAYERS_KEY in metadata and metadata[LAYERS_KEY].isdigit():
        return int(metadata[LAYERS_KEY])
    layers = config.get("layers_per_block")
    return layers if isinstance(layers, int) and "unziplora.version" not in metadata else keys.LAYERS


def _peft_config(path: Path, names: list[str]) -> dict[str, str]:
    """The configuration that PEFT writes beside its own files, where the alpha is, as diffusers' metadata."""
    if not any(name.startswith(PEFT_PREFIX) for name in names):
        return {}
    config = path.parent / "adapter_config.json"
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
        return {layouts.ADAPTER_METADATA: json.dumps({f"unet.{key}": value for key, value in values.items()})}
    except (OSError, ValueError, AttributeError):
        raise UserError(f"a PEFT adapter's alpha is in {config.name}, which is missing beside it, or broken") from None


def write_lora(
    lora: Lora,
    path: str | Path,
    layout: str = "kohya",
    alpha: float | None = None,
    metadata: Mapping[str, str] | None = None,
    dtype: str = "fp16",
) -> None:
    """Write a LoRA to a .safetensors file, whole or not at all.

    Args:
        lora: strength 1; ΔW of the file equals its ΔW.
        path: file to write or replace; folders above it are made.
        layout: "kohya" (sgm block names: what every program loads), "kohya-diffusers" (diffusers' block names)
            or "diffusers" (PEFT's names, for diffusers alone).
        alpha: one for all modules; default: in layout "diffusers" each module's rank, else that of the file it was read
            from, or the highest rank.
        metadata: see `metadata_for`; default: that of the LoRA.
        dtype: "fp16", "bf16" or "fp32".

    Raises:
        UserError: an unknown layout or dtype, no modules, values too large for fp16, a folder at `path`.
        MachineError: disk full, no permission.
    """
    path = Path(path)
    _check_request(lora, path, layout, alpha, dtype)
    pairs = {**lora.modules, **lora.text_modules}
    ranks = {down.shape[0] for down, _ in pairs.values()}
    chosen = float(alpha or (layout != "diffusers" and lora.alpha) or max(ranks))
    adapter = {}
    described = lora.metadata if metadata is None else metadata
    fit = balanced if dtype == "fp16" else None
    if layout == "diffusers":
        tensors, adapter[layouts.ADAPTER_METADATA] = layouts.diffusers(pairs, alpha, fit)
    else:
        spelling = "sgm" if layout == "kohya" else "diffusers"
        tensors = layouts.kohya(pairs, chosen, spelling, _layers(described, {}), fit)
    head = header(
        described,
        ranks=ranks,
        alpha=chosen,
        full_size=families.sdxl_sized({name: shape(pair)[:2] for name, pair in lora.modules.items()}),
        kohya=layout != "diffusers",
    )
    # an alpha that is rounded would scale its whole module
    dtypes = {name: "fp32" if name.endswith(".alpha") else dtype for name in tensors}
    stored = {name: _store(path, name, tensor, dtypes[name]) for name, tensor in tensors.items()}
    write_safetensors(path, stored, {**head, **adapter})


def _check_request(lora: Lora, path: Path, layout: str, alpha: float | None, dtype: str) -> None:
    if layout not in LAYOUTS:
        raise UserError(f"unknown layout {layout!r}: choose one of {', '.join(LAYOUTS)}")
    if dtype not in DTYPES:
        raise UserError(f"unknown dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
    if alpha is not None and not alpha > 0:
        raise UserError(f"alpha must be greater than 0, not {alpha:g}")
    if not lora.modules and not lora.text:
        raise UserError(f"{path}: there is no module to write")
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: the name of a LoRA file must end in .safetensors")
    if path.is_dir():
        raise UserError(f"{path} is a folder: name a file")


def _store(path: Path, name: str, tensor: Tensor, dtype: str) -> Tensor:
    """A tensor as it is stored; one that does not fit is an error, not an infinity."""
    stored = tensor.detach().to("cpu", DTYPES[dtype]).contiguous()
    if not torch.isfinite(stored).all():
        cause = "holds NaN or infinity" if not torch.isfinite(tensor).all() else f"is too large for {dtype}"
        raise UserError(f"{path}: {name} {cause}" + ("; store it as bf16 or fp32" if "large" in cause else ""))
    return stored
