"""LoRA files converted to another layout or resized to a lower rank."""

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
from unziplora.formats.readers import is_factor
from unziplora.lora.algebra import Pair, norm, resize
from unziplora.lora.weights import Lora

T = TypeVar("T")


def convert(
    src: str | Path, dst: str | Path, layout: str = "kohya", dtype: str | None = None, overwrite: bool = False
) -> Lora:
    """Write a LoRA file in another layout with the same ΔW and metadata, and return the LoRA.

    Raises:
        UserError: see `read_lora` and `write_lora`; `dst` exists and `overwrite` is not set.
        MachineError: disk full, no permission.
    """
    src, dst = Path(src).expanduser(), Path(dst).expanduser()
    lora = read_lora(src)
    _refuse_to_overwrite(dst, overwrite)
    write_lora(lora, dst, layout, dtype=dtype or _stored_dtype(src))
    return lora


class ResizeResult(BaseModel):
    """Ranks of a resized LoRA file and the share of the update that remains.

    Attributes:
        path: the new file.
        ranks: rank → number of modules.
        energy: remaining share of Σ‖ΔW‖² over all modules.
        worst: smallest remaining share of one module.
        worst_module: the module with that share.
    """

    path: Path
    ranks: dict[int, int]
    energy: float
    worst: float
    worst_module: str


def resize_file(
    src: str | Path,
    dst: str | Path,
    rank: int | None = None,
    energy: float | None = None,
    layout: str = "kohya",
    dtype: str | None = None,
    overwrite: bool = False,
) -> ResizeResult:
    """Write a LoRA file with each module's best approximation (SVD) of a lower rank.

    Args:
        src: file of any layout.
        dst: file to write.
        rank: highest rank of a module.
        energy: lowest share of each module's ‖ΔW‖² to keep, 0 < energy ≤ 1.
        layout: layout of the new file.
        dtype: number format of the new file; default: that of `src`.
        overwrite: replace `dst` if it exists.

    Raises:
        UserError: rank and energy are both missing or out of range; see also `convert`.
        MachineError: disk full, no permission.
    """
    if rank is None and energy is None:
        raise UserError("no size to resize to: give --rank 16, or --energy 0.95")
    if rank is not None and rank < 1:
        raise UserError(f"rank must be 1 or more, not {rank}")
    if energy is not None and not 0 < energy <= 1:
        raise UserError(f"energy is a share, greater than 0 and at most 1, not {energy:g}")
    src, dst = Path(src).expanduser(), Path(dst).expanduser()
    lora = read_lora(src)
    _refuse_to_overwrite(dst, overwrite)
    modules, text = (
        {path: resize(pair, rank, energy) for path, pair in part.items()} for part in (lora.modules, lora.text)
    )
    write_lora(Lora(modules, lora.metadata, text), dst, layout, dtype=dtype or _stored_dtype(src))
    return _result(dst, {**lora.modules, **lora.text}, {**modules, **text})


def _result(path: Path, old: dict[str, Pair], new: dict[str, Pair]) -> ResizeResult:
    before = {name: norm(pair) ** 2 for name, pair in old.items()}
    after = {name: norm(pair) ** 2 for name, pair in new.items()}
    # A best approximation is orthogonal to what it leaves out, so squared norms add up. An untrained module keeps 1.
    shares = {name: min(after[name] / total, 1.0) if total > 0 else 1.0 for name, total in before.items()}
    worst = min(shares, key=lambda name: shares[name])
    total = sum(before.values())
    return ResizeResult(
        path=path,
        ranks=count(down.shape[0] for down, _ in new.values()),
        energy=min(sum(after.values()) / total, 1.0) if total > 0 else 1.0,
        worst=shares[worst],
        worst_module=worst,
    )


def _stored_dtype(path: Path) -> str:
    """Return the number format of a file's factors by `write_lora`'s name; fp32 if there are several or another."""
    with safe_open(path, "pt") as file:
        dtypes = {file.get_slice(name).get_dtype() for name in filter(is_factor, file.keys())}
    return {"F16": "fp16", "BF16": "bf16"}.get(dtypes.pop(), "fp32") if len(dtypes) == 1 else "fp32"


def _refuse_to_overwrite(dst: Path, overwrite: bool) -> None:
    if not overwrite and dst.is_file():
        raise UserError(f"{dst} exists already: choose another name, or replace it with --force")


def dtype_name(tensor: Tensor) -> str:
    """Return a tensor's number format by `write_lora`'s name, or by torch's."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    return names.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))


def count(values: Iterable[T]) -> dict[T, int]:
    """Return the number of times each value occurs, the most frequent first."""
    return dict(Counter(values).most_common())
