"""Which device and which number format to compute in."""

from __future__ import annotations

import torch

from unziplora.config.recipe import Precision
from unziplora.errors import UserError, first_line


def pick_device(name: str = "auto") -> torch.device:
    """The device of a name; 'auto' is CUDA, else Apple's MPS, else the CPU.

    Raises:
        UserError: this machine or this build of torch has no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # for what asks the present device: memory statistics, 8-bit optimizers
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(
            f"device {name!r} is not available here ({first_line(error)}); use auto or cpu, or install torch "
            "with support for it"
        ) from None
    return device


def flush_denormals(device: torch.device | str) -> None:
    """Have a CPU take numbers below 1e-38 for zero, in this process from now on: it multiplies others ten times faster.

    Attention to words that hardly matter gives gradients as small as that. torch's worker threads take the setting
    over from the thread that starts them, so this comes before the first large operation.
    """
    if torch.device(device).type == "cpu":
        torch.set_flush_denormal(True)


def pick_dtype(precision: Precision, device: torch.device | str) -> torch.dtype:
    """The number format of a name; 'auto' is bf16 where the device computes in it, else fp16, fp32 on a CPU."""
    if precision != "auto":
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    device = torch.device(device)
    if device.type == "cuda":
        with torch.cuda.device(device):  # cards before Ampere emulate bf16, slowly
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.float16 if device.type == "mps" else torch.float32
