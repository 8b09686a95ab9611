"""Atomic writing: a file or folder is complete or absent, because it is written next to its place and then moved."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from unziplora.errors import MachineError, UserError, first_line

if TYPE_CHECKING:
    from PIL import Image

Writer = Callable[[BinaryIO], object]

_SUFFIXES = {
    *(".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf"),
    *(".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic", ".jxl"),
}


def atomic_write(path: Path, data: bytes | str | Writer) -> None:
    """Write a file atomically: bytes, text (UTF-8), or the output of a function that writes into an open file.

    Raises:
        MachineError: disk full, no permission, or another fault of the machine; nothing is left behind.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        with temporary.open("xb") as file:  # with the permissions that other files get here
            if callable(data):
                data(file)
            else:
                file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise explain(path, error) from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_png(path: Path, image: Image.Image) -> None:
    """Write an image as PNG atomically. Raises the errors of `atomic_write`."""
    atomic_write(path, lambda file: image.save(file, "PNG"))


def atomic_folder(path: Path, fill: Callable[[Path], object]) -> None:
    """Create a folder atomically: `fill` writes its files into a temporary folder next to it (`.tmp-…`).

    An existing folder stays until the new one is complete, and is then replaced.

    Raises:
        MachineError: disk full, no permission, or another fault of the machine; nothing is left behind.
    """
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        fill(temporary)
        for file in temporary.rglob("*"):
            sync(file)
        sync(temporary)
        if path.exists():
            old = path.with_name(f".tmp-old-{path.name}")
            path.replace(old)
            temporary.replace(path)
            shutil.rmtree(old, ignore_errors=True)
        else:
            temporary.replace(path)
        sync(path.parent)
    except OSError as error:
        raise explain(path, error) from None
    except Exception as error:
        # safetensors and torch wrap the system's error in their own, and keep its text
        if any(word in str(error).lower() for word in ("i/o error", "streamwriter", "no space", "unexpected pos")):
            raise MachineError(
                f"{path}: cannot be written ({first_line(error)}); free some space, or write to another disk"
            ) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sync(path: Path) -> None:
    """Ask the system to write a file or folder to disk; Windows cannot sync folders."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # Windows syncs only writable handles
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def explain(path: Path, error: OSError) -> MachineError:
    """Return the message for a failed write: the path, the fault and the remedy."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return MachineError(f"{path}: the disk is full; free some space, or write to another disk")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return MachineError(f"{path}: no permission to write here; choose another folder")
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return MachineError(f"{path}: a file is where a folder should be; choose another folder")
    return MachineError(f"{path}: cannot be written ({error.strerror or error})")


def absolute(path: Path) -> Path:
    """Make a path absolute without resolving links: in the hub's cache they lead to files without a suffix."""
    return Path(os.path.abspath(path))


def file_stem(path: Path) -> str:
    """Return a path's name without the suffix of a model or image file; other dots belong to the name."""
    return path.stem if path.suffix.lower() in _SUFFIXES else path.name


def free_folder(folder: Path) -> Path:
    """Return the folder, or the first of folder-2, folder-3 … that does not exist yet."""
    folder = folder if folder.name else folder.resolve()
    if not folder.name:
        raise UserError(f"{folder}: this is the root of a disk; name another folder")
    number, free = 1, folder
    while free.exists():
        number += 1
        free = folder.with_name(f"{folder.name}-{number}")
    return free
