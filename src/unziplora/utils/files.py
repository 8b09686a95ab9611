"""Atomic writing: a file or folder is complete or absent, because it is written next to its place and then moved."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from unziplora.errors import MachineError, UserError, disk_full, first_line, system_errno

if TYPE_CHECKING:
    from PIL import Image

Writer = Callable[[BinaryIO], object]

UNSUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOLCK}
"""Answers of drives that lack a protection: a sync, a lock."""

_REFUSED = {*UNSUPPORTED, errno.EACCES, errno.EPERM}

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff")
"""Endings of the images in a folder."""

_SUFFIXES = {*(".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf"), *IMAGE_SUFFIXES, ".heic", ".jxl"}


def atomic_write(path: Path, data: bytes | str | Writer) -> None:
    """Write a file atomically: bytes, text (UTF-8), or the output of a function that writes into an open file.

    Raises:
        MachineError: disk full, no permission, or another fault of the machine; nothing is left behind.
    """
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:  # with the permissions that other files get here
            if callable(data):
                data(file)
            else:
                file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            _sync(file.fileno(), UNSUPPORTED)
        _replace(temporary, path)
    except OSError as error:
        raise explain(path, error) from None
    finally:
        _remove(temporary)


def copy_file(source: Path, target: Path) -> None:
    """Copy the contents of a file atomically; missing folders are created. Raises the errors of `atomic_write`."""
    with source.open("rb") as file:
        atomic_write(target, partial(shutil.copyfileobj, file))


def write_png(path: Path, image: Image.Image) -> None:
    """Write an image as PNG atomically. Raises the errors of `atomic_write`."""
    atomic_write(path, lambda file: image.save(file, "PNG"))


def atomic_folder(path: Path, fill: Callable[[Path], object]) -> bool:
    """Create a folder atomically: `fill` writes its files into a temporary folder next to it.

    Returns:
        False if there is something already, which stays, or if this drive cannot move folders.

    Raises:
        MachineError: disk full, no permission, or another fault of the machine; nothing is left behind.
    """
    temporary = _temporary(path)
    try:
        temporary.mkdir(parents=True)
        fill(temporary)
        sync_folder(temporary)
        try:
            temporary.rename(path)
        except OSError:
            return False
        sync_folder(path.parent)
    except OSError as error:
        raise explain(path, error) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return True


def remove_leftovers(folder: Path, name: str = ".+") -> None:
    """Remove what a process that was killed left half-written in a folder.

    Args:
        name: regular expression for the names of the finished files; default: any.
    """
    for path in folder.glob(".*"):
        if re.fullmatch(rf"\.{name}\.[0-9a-f]{{8}}", path.name):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                _remove(path)


def sync_folder(folder: Path) -> None:
    """Ask the system to write the names in a folder to disk; Windows and some drives cannot."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        _sync(handle, {*_REFUSED, errno.EBADF, errno.EISDIR})
    finally:
        os.close(handle)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}")


def _remove(path: Path) -> None:
    with suppress(OSError):  # it is hidden, and swept up later
        path.unlink(missing_ok=True)


def _sync(handle: int, harmless: set[int]) -> None:
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in harmless:
            raise
        warnings.warn("this drive does not sync files; a power failure may lose the last ones", stacklevel=3)


def _replace(source: Path, target: Path) -> None:
    """Move a file to its place; some drives refuse that if there is one already."""
    try:
        source.replace(target)
    except OSError as error:
        if error.errno not in {*_REFUSED, errno.EEXIST} or not target.is_file():
            raise
        target.unlink()
        source.replace(target)
        warnings.warn("this drive does not replace files in one step; a crash meanwhile may lose one", stacklevel=3)


def explain(path: Path, error: Exception) -> MachineError:
    """Return the message for a failed write: the path, the fault and the remedy."""
    number = system_errno(error)
    if disk_full(error):
        return MachineError(f"{path}: the disk is full; free some space, or write to another disk")
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return MachineError(f"{path}: no permission to write here; choose another folder")
    if number in (errno.ENOTDIR, errno.EEXIST):
        return MachineError(f"{path}: a file is where a folder should be; choose another folder")
    return MachineError(f"{path}: cannot be written ({getattr(error, 'strerror', None) or first_line(error)})")


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn the system's errors while something is written at a path into messages that name it (`explain`)."""
    try:
        yield
    except OSError as error:
        raise explain(path, error) from None


def absolute(path: Path) -> Path:
    """Make a path absolute without resolving links: in the hub's cache they lead to files without a suffix."""
    return Path(os.path.abspath(path))


def file_stem(path: Path) -> str:
    """Return a path's name without the suffix of a model or image file; other dots belong to the name."""
    return path.stem if path.suffix.lower() in _SUFFIXES else path.name


def safe_name(text: str, default: str, longest: int | None = None) -> str:
    """Return a text as the name of a file or folder, without what prompts and shells read as a sign."""
    return re.sub(r"[^\w.-]+", "-", text)[:longest].strip(".-") or default


def numbered(path: Path, suffix: str = "") -> Iterator[Path]:
    """Yield a path, then name-2, name-3 …, with the number in front of the suffix."""
    yield path
    stem = path.name.removesuffix(suffix)
    yield from (path.with_name(f"{stem}-{number}{suffix}") for number in count(2))


def free_file(path: Path) -> Path:
    """Return the path, or the first of name-2, name-3 … that does not exist yet."""
    return next(one for one in numbered(path, path.suffix) if not one.exists())


def free_folder(folder: Path) -> Path:
    """Return the folder, or the first of folder-2, folder-3 … that does not exist yet."""
    folder = folder if folder.name else folder.resolve()
    if not folder.name:
        raise UserError(f"{folder}: this is the root of a disk; name another folder")
    return next(one for one in numbered(folder) if not one.exists())


def image_files(folder: Path) -> list[Path]:
    """Return the images in a folder by their names' endings, sorted, without hidden files, such as macOS's `._cat.png`.

    Raises:
        OSError: the folder is missing or cannot be read.
    """
    names = (path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    return sorted(path for path in names if not path.name.startswith("."))


def files_below(folder: Path, without: Collection[str] = ()) -> Iterator[Path]:
    """Yield the paths of a folder's files relative to it, except hidden ones and those under some names."""
    for path in sorted(folder.rglob("*")):
        inner = path.relative_to(folder)
        if path.is_file() and inner.parts[0] not in without and not any(part.startswith(".") for part in inner.parts):
            yield inner
