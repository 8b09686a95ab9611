"""What a long job tells while it runs, and two ways of showing it: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as Bar


@dataclass(frozen=True)
class Progress:
    """One report of a running job.

    Attributes:
        step: steps done so far, 0…steps.
        steps: steps of the whole job; 0 where the length is unknown (loading a base).
        loss: the loss of this step, NaN where there is none.
        seconds_per_step: mean over the last steps.
        memory_bytes: peak memory of the device (GPU) or of the process (CPU).
        message: something worth a line of its own, such as a sample sheet's path.
    """

    step: int
    steps: int
    loss: float = float("nan")
    seconds_per_step: float = 0.0
    memory_bytes: int | None = None
    message: str | None = None

    @property
    def seconds_left(self) -> float:
        """Time to the end at the present speed."""
        return max(0, self.steps - self.step) * self.seconds_per_step


Callback = Callable[[Progress], None]
"""What a job calls after each step."""


def duration(seconds: float) -> str:
    """Seconds as a person reads them: 8 s, 3 min 05 s, 2 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def size(count: float) -> str:
    """Bytes as a person reads them, in powers of 1024: 512 B, 93.2 MiB, 10.4 GiB."""
    if count < 1024:
        return f"{count:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        count /= 1024
        if count < 1024 or unit == "GiB":
            return f"{count:.1f} {unit}"
    raise AssertionError


def describe(event: Progress) -> str:
    """One report as a line: step, loss, speed, time left, memory."""
    parts = [f"step {event.step}/{event.steps}" if event.steps else f"step {event.step}"]
    if event.loss == event.loss:
        parts.append(f"loss {event.loss:.4f}")
    if event.seconds_per_step:
        parts.append(f"{event.seconds_per_step:.2f} s/step")
        if event.steps:
            parts.append(f"{duration(event.seconds_left)} left")
    if event.memory_bytes:
        parts.append(size(event.memory_bytes))
    return "  ".join(parts)


class Lines:
    """Writes every message, and a line of figures at most every `seconds`: for logs and pipes."""

    def __init__(self, stream: TextIO | None = None, seconds: float = 10.0) -> None:
        self.stream = stream or sys.stderr
        self.seconds = seconds
        self.last = float("-inf")

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.flush()

    def __call__(self, event: Progress) -> None:
        if event.message:
            print(event.message, file=self.stream, flush=True)
        now = time.monotonic()
        final = 0 < event.steps == event.step
        # A job's first step is slow and says little; the last one is always told.
        if (event.steps and event.step and now - self.last >= self.seconds) or (final and not event.message):
            self.last = now
            print(describe(event), file=self.stream, flush=True)


class Rich:
    """A progress bar with step, loss, speed, time left and memory, for a terminal."""

    def __init__(self, stream: TextIO | None = None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as RichProgress

        self.bar: Bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            console=Console(file=stream or sys.stderr),
        )
        self.task: Any = None

    def __enter__(self) -> Rich:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def __call__(self, event: Progress) -> None:
        if event.message:
            self.bar.console.print(event.message, markup=False, highlight=False, soft_wrap=True)
        if not event.steps:
            return
        if self.task is None:
            self.task = self.bar.add_task("", total=event.steps, figures="")
        # a message brings no figures: the last ones stay
        fields: dict[str, Any] = {}
        if event.loss == event.loss or event.seconds_per_step:
            fields["figures"] = "  ".join(describe(event).split("  ")[1:])
        self.bar.update(self.task, completed=event.step, total=event.steps, **fields)


class Notebook:
    """Shows a bar with its figures below a notebook's cell, updated in place, and every message above it."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.bar = ""
        self.area: Any = None

    def __enter__(self) -> Notebook:
        from IPython.display import HTML, display

        self.area = display(HTML(""), display_id=True)
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def __call__(self, event: Progress) -> None:
        from IPython.display import HTML

        if event.message:
            self.messages.append(escape(event.message))
        if event.steps:
            self.bar = f'<progress value="{event.step}" max="{event.steps}"></progress> {escape(describe(event))}'
        self.area.update(HTML("<br>".join([*self.messages, self.bar])))


class Silent:
    """Shows nothing: for `--quiet`."""

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def __call__(self, event: Progress) -> None:
        return None


def show(quiet: bool = False, stream: TextIO | None = None) -> Rich | Lines | Notebook | Silent:
    """Choose the view that fits where the output goes; enter it and hand it to a job as its callback."""
    if quiet:
        return Silent()
    if stream is None and _in_notebook():
        return Notebook()
    stream = stream or sys.stderr
    return Rich(stream) if stream.isatty() else Lines(stream)


def _in_notebook() -> bool:
    """Tell a notebook's kernel from a script and from IPython in a terminal."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and getattr(ipython.get_ipython(), "kernel", None) is not None


def counted(view: Callback) -> Callable[[int, int], Any]:
    """A view of progress for jobs that tell steps done and steps in all; the speed is measured here."""
    start = time.perf_counter()

    def report(done: int, total: int) -> None:
        seconds = (time.perf_counter() - start) / done if done else 0.0
        view(Progress(done, total, seconds_per_step=seconds))

    return report
