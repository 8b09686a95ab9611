"""safetensors files on disk: checked before they are read, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from unziplora.errors import MachineError, UserError
from unziplora.formats.identify import PICKLES, UNPICKLE, other_format
from unziplora.utils.files import atomic_write
from unziplora.utils.inputs import open_regular, parse_json

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Number formats by their names in headers."""

HEADER_LIMIT = 100_000_000
"""Largest header in bytes; the limit of the safetensors library."""


@dataclass(frozen=True)
class Header:
    """Names, shapes and number formats of a safetensors file's tensors, and its metadata; no weights."""

    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str]
    dtypes: dict[str, str] = field(default_factory=dict)


def read_header(path: Path) -> Header:
    """Read names, shapes, number formats and metadata of a safetensors file.

    Raises:
        UserError: the file is missing, a folder, a pickle, truncated or not a safetensors file.
        MachineError: the disk or the operating system fails.
    """
    with _clear_errors(path):
        metadata = _read_metadata(path)
        with safe_open(path, "pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            shapes = {key: tuple(tensor.get_shape()) for key, tensor in slices.items()}
            return Header(shapes, metadata, {key: tensor.get_dtype() for key, tensor in slices.items()})


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors and the metadata of a safetensors file. Errors as in `read_header`."""
    with _clear_errors(path):
        metadata = _read_metadata(path)
        return load_file(path), metadata


def body_hash(path: Path) -> str:
    """Return the SHA-256 of all after a file's header, which is its `sshs_model_hash`. Errors as in `read_header`."""
    digest = hashlib.sha256()
    with _clear_errors(path), path.open("rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def _clear_errors(path: Path) -> Iterator[None]:
    """Turn exceptions while a file is read into errors that name it."""
    try:
        yield
    except SafetensorError as error:
        raise UserError(f"{path}: damaged safetensors file ({error}); fetch it again") from None
    except OSError as error:
        raise MachineError(f"{path}: cannot be read ({error.strerror or error})") from None
    except MemoryError:
        raise MachineError(f"{path}: not enough memory to read it") from None


def _read_metadata(path: Path) -> dict[str, str]:
    """Read the metadata, and refuse a file that by its first bytes, header and size is not a whole safetensors file."""
    if path.is_dir():
        names = sorted(file.name for file in path.glob("*.safetensors"))
        raise UserError(f"{path} is a folder: name the file" + (f", such as {names[0]}" if names else ""))
    if not path.exists():
        raise UserError(f"{path}: no such file")
    with open_regular(path) as file:
        start, size = file.read(64), path.stat().st_size
        if size == 0:
            raise UserError(f"{path}: the file is empty; fetch it again")
        if other := UNPICKLE if path.suffix.lower() in PICKLES else other_format(start):
            raise UserError(f"{path}: {other}")
        if start[8:9] != b"{":
            raise UserError(f"{path}: not a safetensors file")
        length = int.from_bytes(start[:8], "little")
        if length > min(HEADER_LIMIT, size):
            raise UserError(f"{path}: truncated, or not a safetensors file; fetch it again")
        file.seek(8)
        return _parse_header(path, file.read(length), size)


def _parse_header(path: Path, raw: bytes, size: int) -> dict[str, str]:
    """Return the metadata of a header, and refuse a file that is shorter than the header declares."""
    try:
        header: dict[str, Any] = parse_json(raw)
        metadata = dict((header.get("__metadata__") or {}).items())
        ends = [int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"]
        whole = 8 + len(raw) + max(ends, default=0)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError):
        if len(raw) + 8 > size:
            raise UserError(f"{path}: truncated, or not a safetensors file; fetch it again") from None
        raise UserError(f"{path}: not a safetensors file (its header is not JSON)") from None
    if whole > size:
        raise UserError(f"{path}: truncated at {size:,} of {whole:,} bytes; fetch it again")
    return {str(key): str(value) for key, value in metadata.items()}


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and metadata to a file, atomically.

    The metadata are completed with `modelspec.hash_sha256` and kohya's `sshs_model_hash`, the SHA-256 of everything
    after the header.

    Raises:
        MachineError: disk full, no permission.
    """
    digest = hashlib.sha256()
    for name in _order(tensors):
        digest.update(raw_bytes(tensors[name]))
    hashes = {"modelspec.hash_sha256": f"0x{digest.hexdigest()}", "sshs_model_hash": digest.hexdigest()}
    atomic_write(path, lambda file: write_tensors(file, tensors, {**metadata, **hashes}))


def write_tensors(file: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and metadata into an open file, tensor by tensor; no copy of the whole is made in memory."""
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name in _order(tensors):
        tensor, start, end = tensors[name], end, end + tensors[name].nbytes
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in _order(tensors):
        file.write(raw_bytes(tensors[name]))


def _order(tensors: Mapping[str, Tensor]) -> list[str]:
    """Order tensors as the safetensors library does, so that in memory each number begins at a multiple of its size."""
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))


def raw_bytes(tensor: Tensor) -> Any:
    """Return the bytes of a contiguous tensor on the CPU, without a copy."""
    return tensor.flatten().view(torch.uint8).numpy()
