"""Failures that a user sees as a message; every other exception is a bug and keeps its traceback."""

import sys


class UnziploraError(Exception):
    """A failure whose message names the thing, the fault and the remedy."""

    exit_code = 1


class UserError(UnziploraError):
    """A request that cannot be carried out as stated (exit code 2)."""

    exit_code = 2


class MachineError(UnziploraError):
    """A fault of the machine: disk full, no permission, out of memory (exit code 1)."""

    exit_code = 1


class OutOfMemory(MachineError):
    """Too little memory on the GPU or in the machine."""


class Interrupted(UnziploraError):
    """A run that was stopped on purpose and can be resumed (exit code 130, as in shells)."""

    exit_code = 130


def out_of_memory(error: BaseException) -> bool:
    """Return True if an exception means that a GPU or the CPU ran out of memory. Does not import torch."""
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(
        text in str(error) for text in ("allocate memory", "out of memory", "OUT_OF_MEMORY")
    )


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, for use inside another message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300].rstrip(".")
