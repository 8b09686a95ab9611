"""A base that stays loaded between the tasks of one process."""

from __future__ import annotations

import gc
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # whoever holds a base starts at once; torch comes with the first one
    import torch

    from unziplora.models.base import Base


class KeptBase:
    """The base that was used last; another one, or a change of its files, replaces it."""

    def __init__(self) -> None:
        self.base: Base | None = None
        self.key: tuple[object, ...] = ()

    def load(
        self,
        source: str,
        dtype: torch.dtype,
        device: torch.device,
        *,
        waiting: bool = False,
        before: Callable[[], None] = lambda: None,
    ) -> Base:
        """Return a base that computes on a device, loaded only if it is not the one that is kept.

        Args:
            waiting: leave it on the CPU, from where `models.offload.base_at_work` fetches it.
            before: called if it has to be loaded.

        Raises:
            UserError, MachineError: as `load_base`.
        """
        from unziplora.models.base import load_base

        key = (source, _changed(Path(source).expanduser()), dtype, device)
        if self.base is None or key != self.key:
            self.drop()  # before the next one needs the memory
            before()
            self.base, self.key = load_base(source, dtype, "cpu" if waiting else device), key
            self.base.device = device
        return self.base

    def drop(self) -> None:
        """Free the memory of the base."""
        if self.base is None:
            return
        self.base = None
        free_memory()


def free_memory(error: BaseException | None = None) -> None:
    """Free what no one refers to any more, on the GPU too; first what the frames of a handled error refer to."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error.__traceback__ = None
        error = error.__cause__ or error.__context__
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def _changed(path: Path) -> int:
    """Return the time of the last change of a file or of any in a folder, in nanoseconds; 0 if there is none."""
    files = path.rglob("*") if path.is_dir() else [path]
    return max((file.stat().st_mtime_ns for file in files if file.is_file()), default=0)
