"""LoRA files: read from any layout, written in three, whole or not at all."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unziplora.errors import UserError, faults_of
from unziplora.formats import identify, writers
from unziplora.formats.adapter_config import ADAPTER_CONFIG, AdapterConfig, read_adapter_config
from unziplora.formats.header import LAYERS_KEY, complete_metadata
from unziplora.formats.names import is_peft, unwrap
from unziplora.formats.quantization import dequantized
from unziplora.formats.readers import FileModules, group_by_module, shown, split_embeddings
from unziplora.formats.safetensors import read_header, read_tensors, write_safetensors
from unziplora.formats.sdxl import LAYERS, has_sdxl_widths, other_unet
from unziplora.lora.algebra import balance, shape
from unziplora.lora.weights import Lora
from unziplora.utils.inputs import read_text

PEFT_FILE = "adapter_model.safetensors"
LAYOUTS = ("kohya", "kohya-diffusers", "diffusers")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def read_lora(path: str | Path, unet_config: Mapping[str, Any] | None = None) -> Lora:
    """Read a LoRA for an SDXL-topology UNet from a file of any layout.

    Args:
        path: a .safetensors file.
        unet_config: configuration of the base's UNet, if known. Files for a small base cannot always be read
            without it.

    Raises:
        UserError: the file is missing, damaged, for another family, or not a plain LoRA.
        MachineError: the file cannot be read.
    """
    path = Path(path).expanduser()
    tensors, metadata = read_adapter(path)
    modules = read_modules(path, tensors, metadata, unet_config)
    if broken := not_finite(tensors):
        raise UserError(
            f"{path}: {len(broken)} tensors contain NaN or infinity, the first: {shown(broken[:1])}. "
            "The training had diverged or overflowed; take an earlier checkpoint"
        )
    if modules.unread:
        warnings.warn(
            f"{path}: read without {shown(modules.unread[:4])}{' …' if len(modules.unread) > 4 else ''}: not part of a "
            "LoRA; an embedding is loaded by itself",
            stacklevel=2,
        )
    unet, text = ({name: factors.pair() for name, factors in part.items()} for part in (modules.unet, modules.text))
    alphas = {factors.alpha for factors in modules.all.values()}
    return Lora(unet, metadata, text, alphas.pop() if len(alphas) == 1 else None)


def read_adapter(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors and the metadata of a LoRA file; of any other file, which may have gigabytes, only the header.

    Raises:
        UserError: the file is missing, damaged or not a LoRA; the message names what it is instead.
        MachineError: the file cannot be read.
    """
    if (kind := identify.kind(read_header(path).shapes)) != identify.LORA:
        raise UserError(f"{path}: this is {kind}, not a LoRA")
    return read_tensors(path)


def read_modules(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    unet_config: Mapping[str, Any] | None = None,
) -> FileModules:
    """Group a file's tensors by module.

    Raises:
        UserError: the file is not a plain LoRA for a UNet of SDXL's topology.
    """
    own, embeddings = split_embeddings(tensors)
    if family := identify.family(map(unwrap, own)):
        raise UserError(f"{path}: this LoRA is for {family}, not for SDXL")
    config = dict(unet_config or {})
    with faults_of(path):
        configs = _adapter_configs(path, own, metadata)
        modules = group_by_module(dequantized(own), configs, _layers(metadata, config))
    family = other_unet(modules.shapes, config.get("cross_attention_dim"))
    if family and "unziplora.version" not in metadata:  # our own files are for SDXL's topology, whatever its widths
        raise UserError(f"{path}: this LoRA is for {family}, not for SDXL")
    return replace(modules, unread=[*modules.unread, *embeddings])


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the tensors that contain NaN or infinity."""
    return [name for name, tensor in tensors.items() if not torch.isfinite(tensor.float()).all()]


def _layers(metadata: Mapping[str, str], config: Mapping[str, Any]) -> int:
    """Return the resnets per block, which sgm's names depend on: those of the file's header, of the base, or SDXL's."""
    if re.fullmatch("[1-9]", metadata.get(LAYERS_KEY, "")):
        return int(metadata[LAYERS_KEY])
    layers = config.get("layers_per_block")
    return layers if isinstance(layers, int) and "unziplora.version" not in metadata else LAYERS


def _adapter_configs(path: Path, keys: Iterable[str], metadata: Mapping[str, str]) -> dict[str, AdapterConfig]:
    """Read the configuration that PEFT wrote next to its file, or diffusers into the header, if there is one."""
    if any(map(is_peft, keys)) or (path.name == PEFT_FILE and (path.parent / ADAPTER_CONFIG).exists()):
        try:
            text = read_text(path.parent / ADAPTER_CONFIG)
        except (OSError, ValueError):
            raise UserError(
                f"a PEFT adapter's alpha is in {ADAPTER_CONFIG}, which is missing or unreadable; copy it next to this "
                "file"
            ) from None
        return read_adapter_config(text, ADAPTER_CONFIG)
    header = metadata.get(writers.ADAPTER_METADATA)
    if header is None or all(key.startswith("lora_") for key in keys):  # kohya's files contain their alphas
        return {}
    return read_adapter_config(header, f"{writers.ADAPTER_METADATA} in the header")


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
        lora: every ΔW is written at strength 1.
        path: file to write or replace; missing folders are created.
        layout: "kohya" (sgm block names, which every program loads), "kohya-diffusers" (diffusers' block names)
            or "diffusers" (PEFT's names, for diffusers alone).
        alpha: one for all modules. The default is each module's rank in layout "diffusers"; in the others the LoRA's
            own alpha, or else the highest rank.
        metadata: see `metadata_for`; default: the LoRA's own.
        dtype: "fp16", "bf16" or "fp32".

    Raises:
        UserError: an unknown layout or dtype, no modules, values too large for fp16, a folder at `path`.
        MachineError: disk full, no permission.
    """
    path = Path(path).expanduser()
    _check_request(lora, path, layout, alpha, dtype)
    pairs = {**lora.modules, **lora.text}
    ranks = {down.shape[0] for down, _ in pairs.values()}
    file_alpha = float(alpha or (layout != "diffusers" and lora.alpha) or max(ranks))
    metadata = lora.metadata if metadata is None else metadata
    if layout != "diffusers" or alpha is not None:  # programs multiply B A by alpha / rank
        pairs = {path: (down, up * (down.shape[0] / file_alpha)) for path, (down, up) in pairs.items()}
    if dtype == "fp16":
        pairs = {path: balance(pair) for path, pair in pairs.items()}
    adapter = {}
    if layout == "diffusers":
        tensors, adapter[writers.ADAPTER_METADATA] = writers.diffusers(pairs, alpha)
    else:
        blocks = "sgm" if layout == "kohya" else "diffusers"
        tensors = writers.kohya(pairs, file_alpha, blocks, _layers(metadata, {}))
    header = complete_metadata(
        metadata,
        ranks=ranks,
        alpha=file_alpha,
        full_size=has_sdxl_widths({name: shape(pair)[:2] for name, pair in lora.modules.items()}),
        kohya=layout != "diffusers",
    )
    # Rounding an alpha would scale its whole module.
    dtypes = {name: "fp32" if name.endswith(".alpha") else dtype for name in tensors}
    stored = {name: _store(path, name, tensor, dtypes[name]) for name, tensor in tensors.items()}
    write_safetensors(path, stored, {**header, **adapter})


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
    """Convert a tensor to a number format, and refuse one with values that the format turns into infinity."""
    stored = tensor.detach().to("cpu", DTYPES[dtype]).contiguous()
    if not torch.isfinite(stored).all():
        cause = "contains NaN or infinity" if not torch.isfinite(tensor).all() else f"is too large for {dtype}"
        raise UserError(f"{path}: {name} {cause}" + ("; store it as bf16 or fp32" if "large" in cause else ""))
    return stored
