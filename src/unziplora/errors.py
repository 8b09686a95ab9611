"""The two kinds of failure that a person sees; everything else is a bug and keeps its traceback."""

import sys


class UnziploraError(Exception):
    """A failure with a message for a person: what was wrong, where, and what to do next."""

    exit_code = 1


class UserError(UnziploraError):
    """The request cannot be carried out as it was asked (exit code 2)."""

    exit_code = 2


class MachineError(UnziploraError):
    """The machine stood in the way: disk full, no permission, out of memory (exit code 1)."""

    exit_code = 1


class OutOfMemory(MachineError):
    """Memory, of the GPU or of the machine, does not suffice."""


class Interrupted(UnziploraError):
    """A run was stopped on purpose after saving a checkpoint (exit code 130, as shells do)."""

    exit_code = 130


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory ran out, on a GPU or the CPU; torch is not imported for it."""
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(
        text in str(error) for text in ("allocate memory", "out of memory", "OUT_OF_MEMORY")
    )


def first_line(error: BaseException) -> str:
    """What an exception says, cut to one line for use inside a message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300].rstrip(".")
