"""LoRA files in another layout or of another rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel
from safetensors import safe_open
from torch import Tensor

from unziplora.errors import UserError
from unziplora.formats.files import DTYPES, read_lora, write_lora
from unziplora.lora import algebra
from unziplora.lora.algebra import Pair
from unziplora.lora.weights import Lora, text_tensors

T = TypeVar("T")


def convert(
    src: str | Path,
    dst: str | Path,
    layout: str = "kohya",
    dtype: str | None = None,
    overwrite: bool = False,
) -> Lora:
    """Write a LoRA file anew in another layout; every ΔW and the metadata stay. Returns what was written.

    Raises:
        UserError: see `read_lora` and `write_lora`; `dst` exists and `overwrite` is not set.
        MachineError: disk full, no permission.
    """
    lora = read_lora(src)
    _spare(dst, overwrite)
    write_lora(lora, dst, layout, dtype=dtype or stored_dtype(src))
    return lora


class Resized(BaseModel):
    """Outcome of a change of rank."""

    path: Path
    ranks: dict[int, int]
    energy: float
    """Share of Σ‖ΔW‖² that was kept, over all modules."""
    worst: float
    worst_module: str
    """The module that kept the smallest share, and that share."""


def resize_file(
    src: str | Path,
    dst: str | Path,
    rank: int | None = None,
    energy: float | None = None,
    layout: str = "kohya",
    dtype: str | None = None,
    overwrite: bool = False,
) -> Resized:
    """Write a LoRA file of lower rank: each module's best approximation (SVD) of a rank or share of energy.

    Args:
        src: any layout.
        dst: file to write.
        rank: the highest rank; modules of a lower one keep theirs.
        energy: keep as few directions as hold this share of ‖ΔW‖² per module, 0 < energy ≤ 1.
        layout: of the new file.
        dtype: of the new file; default: that of the old.
        overwrite: replace `dst` if it exists.

    Raises:
        UserError: neither or impossible rank and energy, see also `convert`.
        MachineError: disk full, no permission.
    """
    if rank is None and energy is None:
        raise UserError("say to what to resize: a rank, or a share of energy such as 0.95")
    if rank is not None and rank < 1:
        raise UserError(f"rank must be 1 or more, not {rank}")
    if energy is not None and not 0 < energy <= 1:
        raise UserError(f"energy is a share, greater than 0 and at most 1, not {energy:g}")
    lora = read_lora(src)
    _spare(dst, overwrite)
    old = {**lora.modules, **lora.text_modules}
    new = {path: algebra.resize(pair, rank, energy) for path, pair in old.items()}
    modules = {path: pair for path, pair in new.items() if path in lora.modules}
    text = text_tensors({path: pair for path, pair in new.items() if path not in lora.modules})
    write_lora(Lora(modules, lora.metadata, text), dst, layout, dtype=dtype or stored_dtype(src))
    return _kept(Path(dst), old, new)


def _kept(path: Path, old: dict[str, Pair], new: dict[str, Pair]) -> Resized:
    before = {name: algebra.norm(pair) ** 2 for name, pair in old.items()}
    after = {name: algebra.norm(pair) ** 2 for name, pair in new.items()}
    # A best approximation is orthogonal to what it leaves out, so the squared norms divide; 0 keeps all of 0.
    shares = {name: min(after[name] / total, 1.0) if total > 0 else 1.0 for name, total in before.items()}
    worst = min(shares, key=lambda name: shares[name])
    total = sum(before.values())
    return Resized(
        path=path,
        ranks=counted(down.shape[0] for down, _ in new.values()),
        energy=min(sum(after.values()) / total, 1.0) if total > 0 else 1.0,
        worst=shares[worst],
        worst_module=worst,
    )


def stored_dtype(path: str | Path) -> str:
    """The precision that a file's factors are stored in, as `write_lora` names it; others become fp32."""
    with safe_open(path, "pt") as file:
        found = {file.get_slice(name).get_dtype() for name in file.keys() if not name.endswith(".alpha")}  # noqa: SIM118
    return {"F16": "fp16", "BF16": "bf16"}.get(found.pop(), "fp32") if len(found) == 1 else "fp32"


def _spare(dst: str | Path, overwrite: bool) -> None:
    if not overwrite and Path(dst).is_file():
        raise UserError(f"{dst} exists already: choose another name, or replace it with --force")


def dtype_name(tensor: Tensor) -> str:
    """A tensor's type as `write_lora` names it, or as torch does."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    return names.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))


def counted(values: Iterable[T]) -> dict[T, int]:
    """How often each value occurs, the most frequent first."""
    return dict(Counter(values).most_common())
