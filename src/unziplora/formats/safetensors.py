"""safetensors files on disk: opened with every fault named, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as serialise
from torch import Tensor

from unziplora.errors import MachineError, UserError
from unziplora.utils.files import atomic_write

PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
UNPICKLE = "a pickled file, which can run code when it is opened, so it never is; convert it to .safetensors"
# A pickle begins with PROTO and its number, 2 to 5.
_PROTOCOLS = tuple(bytes([0x80, protocol]) for protocol in range(2, 6))


@dataclass(frozen=True)
class Header:
    """Names and shapes of a safetensors file's tensors, and its metadata; no weights."""

    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str]


def is_pickle(start: bytes) -> bool:
    """Whether a file that starts like this (9 bytes or more) is a pickle, plain or in a zip.

    A safetensors file starts with the length of its header, which can begin like a pickle: then a brace follows.
    """
    return start.startswith(b"PK\x03\x04") or (start[:2] in _PROTOCOLS and start[8:9] != b"{")


def read_header(path: Path) -> Header:
    """Read what a safetensors file holds; files of other kinds are refused by name.

    Raises:
        UserError: the file is missing, a folder, a pickle, truncated or no safetensors file.
        MachineError: the machine cannot read it.
    """
    with _faults_named(path):
        metadata = _checked(path)
        with safe_open(path, "pt") as file:
            return Header({key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}, metadata)  # noqa: SIM118


def open_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file. Errors as in `read_header`."""
    with _faults_named(path):
        metadata = _checked(path)
        return load_file(path), metadata


def body_hash(path: Path) -> str:
    """SHA-256 of all after a safetensors file's header, which is its `sshs_model_hash`. Errors as in `read_header`."""
    digest = hashlib.sha256()
    with _faults_named(path), path.open("rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


@contextmanager
def _faults_named(path: Path) -> Iterator[None]:
    try:
        yield
    except SafetensorError as error:
        raise UserError(f"{path}: damaged safetensors file ({error}); fetch it again") from None
    except OSError as error:
        raise MachineError(f"{path}: cannot be read ({error.strerror or error})") from None
    except MemoryError:
        raise MachineError(f"{path}: not enough memory to read it") from None


def _checked(path: Path) -> dict[str, str]:
    """The metadata of a file that is a whole safetensors file, as far as its header tells."""
    if path.is_dir():
        found = sorted(file.name for file in path.glob("*.safetensors"))
        raise UserError(f"{path} is a folder: name the file" + (f", such as {found[0]}" if found else ""))
    if not path.exists():
        raise UserError(f"{path}: no such file")
    with path.open("rb") as file:
        start, size = file.read(64), path.stat().st_size
        _refuse_other_files(path, start, size)
        length = int.from_bytes(start[:8], "little")
        file.seek(8)
        head = _header(path, file.read(min(length, size)), length, size)
    return {str(key): str(value) for key, value in head["__metadata__"].items()}


def _refuse_other_files(path: Path, start: bytes, size: int) -> None:
    if size == 0:
        raise UserError(f"{path}: the file is empty; fetch it again")
    if path.suffix.lower() in PICKLES or is_pickle(start):
        raise UserError(f"{path}: {UNPICKLE}")
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{path}: a Git LFS pointer, not the file itself; run 'git lfs pull'")
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise UserError(f"{path}: a web page, not a model: the download asked for a login; fetch it again")
    if start.startswith(b"GGUF"):
        raise UserError(f"{path}: a GGUF file; only .safetensors files are read")
    if size < 9 or start[8:9] != b"{":
        raise UserError(f"{path}: not a safetensors file")


def _header(path: Path, raw: bytes, length: int, size: int) -> dict[str, Any]:
    """The header of a safetensors file as a dictionary; a file shorter than it says is named truncated."""
    try:
        head: dict[str, Any] = json.loads(raw)
        head["__metadata__"] = dict((head.get("__metadata__") or {}).items())
        ends = [int(entry["data_offsets"][1]) for name, entry in head.items() if name != "__metadata__"]
        end = max(ends, default=0)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        if length > len(raw):
            raise UserError(f"{path}: truncated, or not a safetensors file; fetch it again") from None
        raise UserError(f"{path}: not a safetensors file (its header is no JSON)") from None
    if 8 + length + end > size:
        raise UserError(f"{path}: truncated at {size:,} of {8 + length + end:,} bytes; fetch it again")
    return head


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors with a header that holds their hash, atomically.

    `modelspec.hash_sha256` and kohya's `sshs_model_hash` are the SHA-256 of everything after the header.

    Raises:
        MachineError: disk full, no permission.
    """
    plain = memoryview(serialise(tensors))
    length = int.from_bytes(plain[:8], "little")
    body = plain[8 + length :]
    digest = hashlib.sha256(body).hexdigest()
    head = {
        "__metadata__": {**metadata, "modelspec.hash_sha256": f"0x{digest}", "sshs_model_hash": digest},
        **json.loads(bytes(plain[8 : 8 + length])),
    }
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    atomic_write(path, lambda file: [file.write(part) for part in (len(text).to_bytes(8, "little"), text, body)])
