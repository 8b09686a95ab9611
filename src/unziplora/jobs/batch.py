"""A batch: many trainings in one process, which continues where it was interrupted, and a report of them."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from PIL import Image, ImageOps

from unziplora.errors import Interrupted, MachineError, UserError
from unziplora.images.sheet import LARGEST, sheet
from unziplora.jobs.claim import Claim
from unziplora.jobs.queue import refuse_waiting
from unziplora.jobs.rows import Row
from unziplora.jobs.state import read_failure, state_of
from unziplora.jobs.worker import Train, execute
from unziplora.runs.folder import RunFolder
from unziplora.utils.files import absolute, atomic_write, write_png
from unziplora.utils.progress import Callback, Progress, duration
from unziplora.utils.signals import STOP, caught
from unziplora.utils.text import table

REPORT, SHEET = "report.md", "contact-sheet.png"
THUMBNAIL = 640
"""Largest side of a run on the contact sheet, in pixels."""


@dataclass(frozen=True)
class Result:
    """Outcome of a row: finished now, skipped because it was finished before, or failed for a reason."""

    row: Row
    outcome: Literal["finished", "skipped", "failed"]
    reason: str = ""
    seconds: float = 0.0

    @property
    def run(self) -> RunFolder:
        return RunFolder(self.row.config.out)


Results = Generator[Result, None, None]
Engine = Callable[[Sequence[Row], Callback], Results]
"""Trains rows, and yields the result of each when it has ended.

On a KeyboardInterrupt it saves the runs in progress and raises it again."""


def default_folder(source: Path) -> Path:
    """Return the folder of a batch for which none is named: that of its source's name in `runs`."""
    whole = absolute(source)
    return Path("runs") / (whole.stem if whole.is_file() else whole.name)


def run_batch(rows: Sequence[Row], out: Path, engine: Engine, progress: Callback) -> list[Result]:
    """Train the rows; write a report and a contact sheet into a folder, also when stopped.

    Raises:
        Interrupted: asked to stop; the same batch continues.
        MachineError: the reason of a failure, or the report, cannot be written.
    """
    results: list[Result] = []
    order = {id(row): number for number, row in enumerate(rows)}
    try:
        with caught(signal.default_int_handler, *STOP), closing(engine(rows, progress)) as ended:
            for number, result in enumerate(ended, 1):
                results.append(result)
                end = f"{result.outcome}: {result.reason}" if result.reason else result.outcome
                progress(Progress(1, 1, message=f"{end}, {number} of {len(rows)}", job=result.run.path.name))
    except (Interrupted, KeyboardInterrupt):
        raise Interrupted(f"stopped after {len(results)} of {len(rows)} runs; the same command continues") from None
    finally:
        results.sort(key=lambda result: order[id(result.row)])
        write_report(results, len(rows), out)
    return results


def in_this_process(train: Train) -> Engine:
    """Return the engine that trains the rows of a batch one after the other."""
    return partial(_train_rows, train)


def _train_rows(train: Train, rows: Sequence[Row], progress: Callback) -> Results:
    for number, row in enumerate(rows, 1):
        progress(Progress(message=f"run {number} of {len(rows)}: {row.config.out}"))
        yield _train(row, train, progress)


def _train(row: Row, train: Train, progress: Callback) -> Result:
    start = time.monotonic()
    claim = claim_row(row)
    if isinstance(claim, Result):
        return claim
    try:
        error = execute(claim, train, progress)
    except MachineError as fault:
        error = fault
    finally:
        claim.release()
    outcome: Literal["finished", "failed"] = "finished" if error is None else "failed"
    return Result(row, outcome, "" if error is None else str(error), time.monotonic() - start)


def claim_row(row: Row) -> Claim | Result:
    """Create the run folder of a row, unless it has begun, and claim it; return a result if there is nothing to do."""
    run = RunFolder(row.config.out)
    if state_of(run) == "finished":
        return Result(row, "skipped")
    try:
        if state_of(run) != "running" and (run.is_free() or not run.unfinished):
            refuse_waiting(run.path)
            with RunFolder.created(run.path, row.config):
                pass
        claim = Claim(run)
        return claim if claim.acquire() else Result(row, "failed", "another process is working on it")
    except (UserError, MachineError) as fault:
        return Result(row, "failed", str(fault))


def write_report(results: Sequence[Result], planned: int, out: Path) -> None:
    """Write `report.md` and, if there are samples, `contact-sheet.png`.

    Raises:
        MachineError: disk full, no permission.
    """
    images = [(result.run.path.name, result.run.sheets[-1]) for result in results if result.run.sheets]
    if images:
        write_png(out / SHEET, contact_sheet(images))
    counts = {name: sum(result.outcome == name for result in results) for name in ("finished", "skipped", "failed")}
    counts["not finished"] = planned - len(results)
    lines = ["# Batch", "", ", ".join(f"{count} {name}" for name, count in counts.items() if count), ""]
    lines += [f"![Contact sheet]({SHEET})", ""] if images else []
    rows = []
    for result in results:
        words = ", ".join(word for name, word in result.row.config.words().items() if name != "token")
        spent = duration(result.seconds) if result.seconds else ""
        rows.append((result.run.path.name, words, result.outcome, spent))
    lines.append(table(("run", "words", "result", "time"), rows))
    for result in results:
        if result.outcome == "failed":
            failure = read_failure(result.run)
            log = failure.log if failure else []
            lines += ["", f"## {result.run.path.name} failed", "", result.reason, "", "```", *log, "```"]
    atomic_write(out / REPORT, "\n".join(lines) + "\n")


def contact_sheet(images: Sequence[tuple[str, Path]]) -> Image.Image:
    """Arrange the last sample sheets of runs in a square, each above the name of its run."""
    columns = math.ceil(math.sqrt(len(images)))
    side = min(THUMBNAIL, LARGEST * 7 // 10 // columns - 24)  # the rest is for gaps and names
    cells = []
    for name, path in images:
        with Image.open(path) as image:
            cells.append(sheet([[ImageOps.contain(image.convert("RGB"), (side, side))]], columns=[name]))
    return sheet([cells[start : start + columns] for start in range(0, len(cells), columns)])
