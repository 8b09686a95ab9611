"""Failures that a user sees as a message; every other exception is a bug and keeps its traceback."""

import errno
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UnziploraError(Exception):
    """A failure whose message names the thing, the fault and the remedy."""

    exit_code = 1


class UserError(UnziploraError):
    """A request that cannot be carried out as stated (exit code 2)."""

    exit_code = 2


class NonFiniteLoss(UserError):
    """An infinite or undefined loss, after which nothing can be learned."""


class MachineError(UnziploraError):
    """A fault of the machine: disk full, no permission, out of memory (exit code 1)."""


class OutOfMemory(MachineError):
    """Too little memory on the GPU or in the machine."""


class Interrupted(UnziploraError):
    """A run that was stopped on purpose and can be resumed (exit code 130, as in shells)."""

    exit_code = 130


@contextmanager
def faults_of(place: object) -> Iterator[None]:
    """Name the place of a user's fault, such as a file, in front of its message."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{place}: {error}") from None


def out_of_memory(error: BaseException) -> bool:
    """Return True if an exception means that a GPU or the CPU ran out of memory. Does not import torch."""
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError | OutOfMemory) or (
        torch is not None and isinstance(error, torch.OutOfMemoryError)
    ):
        return True
    return isinstance(error, RuntimeError) and any(
        text in str(error) for text in ("allocate memory", "out of memory", "OUT_OF_MEMORY")
    )


def system_errno(error: BaseException | None) -> int | None:
    """Return the number of the system's error behind an exception, even one that a library wrapped or spelled out."""
    while error is not None:
        if isinstance(error, OSError) and error.errno:
            return error.errno
        if match := re.search(r"\(os error (\d+)\)", str(error)):  # as Rust writes it, in safetensors
            return int(match[1])
        error = error.__cause__ or error.__context__
    return None


def disk_full(error: BaseException) -> bool:
    """Return True if a disk, a quota or the largest file of a file system is the reason of an exception."""
    return system_errno(error) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, for use inside another message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300].rstrip(".")
