"""Choice of device and number format, and process-wide settings that apply only while a call computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

from unziplora.config.recipe import Precision
from unziplora.errors import UserError, first_line


def pick_device(name: str = "auto") -> torch.device:
    """Return the device of a name; 'auto' is CUDA, else Apple's MPS, else the CPU.

    Raises:
        UserError: this machine or this build of torch has no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        probe = torch.zeros(1, device=torch.device(name))
        probe.item()  # nothing can be read from `meta`
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UserError(
            f"device {name!r} is not available here ({first_line(error)}); use auto or cpu, or install torch "
            "with support for it"
        ) from None
    return probe.device  # with its number, as the tensors on it have it


@contextmanager
def computing_on(device: torch.device) -> Iterator[None]:
    """Set up the process for a long computation on a device, and restore its former state afterwards.

    A GPU becomes the current one, which memory statistics, CUDA graphs and 8-bit optimizers ask for. On a CPU
    denormals are flushed.
    """
    current = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with current, flushed_denormals(device):
        yield


@contextmanager
def flushed_denormals(device: torch.device) -> Iterator[None]:
    """Temporarily flush denormals to zero if the device is a CPU, where they make multiplication ten times slower.

    Attention to words that hardly matter has gradients that small. torch's worker threads take the setting over
    from the thread that starts them, so this context must be entered before the first large operation.
    """
    before = (torch.full((1,), 1e-40) * 1).item() == 0  # torch has no getter
    if device.type == "cpu":
        torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


def pick_dtype(precision: Precision, device: torch.device | str) -> torch.dtype:
    """Return the number format of a name; 'auto' is bf16 where the device computes in it, else fp16, fp32 on a CPU."""
    if precision != "auto":
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    device = torch.device(device)
    if device.type == "cuda":
        with torch.cuda.device(device):  # cards before Ampere emulate bf16, slowly
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.float16 if device.type == "mps" else torch.float32
