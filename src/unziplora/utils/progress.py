"""Progress reports of long jobs, and views that show them: a bar in terminals and notebooks, lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any, TextIO, cast

from unziplora.utils.streams import SteadyStream
from unziplora.utils.text import printable

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
        message: text with a line of its own, such as a sample sheet's path.
        job: name of the job, where several run at once.
    """

    step: int = 0
    steps: int = 0
    loss: float = float("nan")
    seconds_per_step: float = 0.0
    memory_bytes: int | None = None
    message: str | None = None
    job: str = ""

    @property
    def seconds_left(self) -> float:
        """Seconds to the end at the present speed."""
        return max(0, self.steps - self.step) * self.seconds_per_step


Callback = Callable[[Progress], None]
"""Function that a job calls after each step."""


def duration(seconds: float) -> str:
    """Format seconds for people: 8 s, 3 min 05 s, 2 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def size(count: float) -> str:
    """Format bytes for people, in powers of 1024: 512 B, 93.2 MiB, 10.4 GiB."""
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if count >= 1 << power:
            return f"{count / (1 << power):.1f} {unit}"
    return f"{count:.0f} B"


def describe(event: Progress) -> str:
    """Format a report as a line: step, loss, speed, time left, memory."""
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


def message_of(event: Progress) -> str:
    """Return the message of a report, after the name of its job if it has one."""
    return printable(f"{event.job}: {event.message}" if event.job else event.message or "")


class View:
    """A context manager and the callback of a job; shows nothing by itself, for `--quiet`."""

    def __enter__(self) -> View:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def __call__(self, event: Progress) -> None:
        return None


class Lines(View):
    """View for logs and pipes: every message, and a line of figures at most every `seconds`."""

    def __init__(self, stream: TextIO | None = None, seconds: float = 10.0) -> None:
        self.stream = stream or sys.stderr
        self.seconds = seconds
        self.last: dict[str, float] = {}  # by job

    def __call__(self, event: Progress) -> None:
        if event.message:
            print(message_of(event), file=self.stream, flush=True)
        now, last = time.monotonic(), self.last.get(event.job, float("-inf"))
        final = 0 < event.steps == event.step
        # Step 0 has no figures yet; the last step is always shown.
        if (event.steps and event.step and now - last >= self.seconds) or (final and not event.message):
            self.last[event.job] = now
            print(f"{event.job}  {describe(event)}".strip(), file=self.stream, flush=True)


class Rich(View):
    """View for terminals: a bar with step, loss, speed, time left and memory, for each job that is running."""

    def __init__(self, stream: TextIO | None = None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as RichProgress

        self.bar: Bar = RichProgress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            console=Console(file=stream or sys.stderr),
        )
        self.tasks: dict[str, Any] = {}

    def __enter__(self) -> Rich:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def __call__(self, event: Progress) -> None:
        if event.message:
            self.bar.console.print(message_of(event), markup=False, highlight=False, soft_wrap=True)
        if not event.steps:
            return
        if event.job and event.step == event.steps:
            if event.job in self.tasks:
                self.bar.remove_task(self.tasks.pop(event.job))
            return
        if event.job not in self.tasks:
            self.tasks[event.job] = self.bar.add_task(event.job, total=event.steps, figures="")
        # a message has no figures; the last ones stay
        fields: dict[str, Any] = {}
        if event.loss == event.loss or event.seconds_per_step:
            fields["figures"] = "  ".join(describe(event).split("  ")[1:])
        self.bar.update(self.tasks[event.job], completed=event.step, total=event.steps, **fields)


class Notebook(View):
    """View for notebooks: every message, and below them a bar for each running job, updated in place."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.bars: dict[str, str] = {}
        self.area: Any = None

    def __enter__(self) -> Notebook:
        from IPython.display import HTML, display

        self.area = display(HTML(""), display_id=True)
        return self

    def __call__(self, event: Progress) -> None:
        from IPython.display import HTML

        if event.message:
            self.messages.append(escape(message_of(event)))
        if event.job and 0 < event.steps == event.step:
            self.bars.pop(event.job, None)
        elif event.steps:
            figures = escape(f"{event.job} {describe(event)}".strip())
            self.bars[event.job] = f'<progress value="{event.step}" max="{event.steps}"></progress> {figures}'
        self.area.update(HTML("<br>".join([*self.messages, *self.bars.values()])))


def show(quiet: bool = False, stream: TextIO | None = None) -> View:
    """Return the view that suits the output stream: a context manager and the callback of a job."""
    if stream is None and _in_notebook():
        return View() if quiet else Notebook()
    stream = stream or sys.stderr
    if quiet or stream is None:  # as in a program without a console
        return View()
    stream = cast(TextIO, SteadyStream(stream))
    return Rich(stream) if stream.isatty() else Lines(stream)


def _in_notebook() -> bool:
    # IPython in a terminal has no kernel
    ipython = sys.modules.get("IPython")
    return ipython is not None and getattr(ipython.get_ipython(), "kernel", None) is not None


def counted(view: Callback) -> Callable[[int, int], None]:
    """Adapt a view to jobs that count steps alone; the speed is measured from each call with 0 steps done."""
    start = time.perf_counter()

    def report(done: int, total: int) -> None:
        nonlocal start
        if not done:
            start = time.perf_counter()
        view(Progress(done, total, seconds_per_step=(time.perf_counter() - start) / done if done else 0.0))

    return report
