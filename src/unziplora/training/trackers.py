"""Experiment trackers: TensorBoard, Weights & Biases and Trackio."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

PROJECT = "unziplora"


class Tracker(Protocol):
    """A service or file that records the curves of a run."""

    def log(self, values: dict[str, float], step: int) -> None: ...

    def finish(self) -> None: ...


class TensorBoard:
    """An event file for TensorBoard."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / PROJECT))
        self.writer.add_hparams(dict(settings), {})

    def log(self, values: dict[str, float], step: int) -> None:
        """Add one point to each curve."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, global_step=step)
        self.writer.flush()

    def finish(self) -> None:
        """Close the file."""
        self.writer.close()


@contextmanager
def trackers(names: Sequence[str], folder: Path, settings: Mapping[str, Any]) -> Iterator[list[Tracker]]:
    """Open trackers by name; close them at the end.

    Args:
        folder: folder for the trackers that write files.
        settings: settings of the run: numbers and strings.
    """
    with ExitStack() as stack:
        opened: list[Tracker] = []
        for name in names:
            if name == "tensorboard":
                tracker: Tracker = TensorBoard(folder, settings)
            else:  # wandb and trackio share one interface
                tracker = import_module(name).init(project=PROJECT, config=dict(settings))
            stack.callback(tracker.finish)
            opened.append(tracker)
        yield opened
