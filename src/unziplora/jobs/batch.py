"""A batch: many trainings in one process, which continues where it was interrupted, and a report of them."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image, ImageOps

from unziplora.errors import Interrupted, UnziploraError
from unziplora.images.sheet import sheet
from unziplora.jobs.claim import Claim
from unziplora.jobs.rows import Row
from unziplora.jobs.state import read_failure, state_of
from unziplora.jobs.worker import Train, execute
from unziplora.runs.folder import RunFolder
from unziplora.utils.files import absolute, atomic_write, write_png
from unziplora.utils.progress import Callback, Progress, duration
from unziplora.utils.signals import STOP, caught

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


def default_folder(source: Path) -> Path:
    """Return the folder of a batch for which none is named: that of its source's name in `runs`."""
    whole = absolute(source)
    return Path("runs") / (whole.stem if whole.is_file() else whole.name)


def run_batch(rows: Sequence[Row], out: Path, train: Train, progress: Callback) -> list[Result]:
    """Train the rows one after the other; write a report and a contact sheet into a folder, also when stopped.

    Raises:
        Interrupted: asked to stop; the same batch continues.
        MachineError: the reason of a failure, or the report, cannot be written.
    """
    results: list[Result] = []
    try:
        with caught(signal.default_int_handler, *STOP):
            for number, row in enumerate(rows, 1):
                progress(Progress(0, 0, message=f"run {number} of {len(rows)}: {row.config.out}"))
                results.append(_train(row, train, progress))
                if results[-1].reason:
                    progress(Progress(0, 0, message=f"failed: {results[-1].reason}"))
    except (Interrupted, KeyboardInterrupt):
        write_report(results, len(rows), out)
        raise Interrupted(f"stopped after {len(results)} of {len(rows)} runs; the same command continues") from None
    write_report(results, len(rows), out)
    return results


def _train(row: Row, train: Train, progress: Callback) -> Result:
    run, start = RunFolder(row.config.out), time.monotonic()
    if state_of(run) == "finished":
        return Result(row, "skipped")
    claim = Claim(run)
    try:
        if state_of(run) != "running" and (run.is_free() or not run.unfinished):
            with RunFolder.created(run.path, row.config):
                pass
        if not claim.acquire():
            return Result(row, "failed", "another process is working on it")
        error = execute(claim, train, progress)
    except UnziploraError as fault:
        if isinstance(fault, Interrupted):
            raise
        error = fault
    finally:
        claim.release()
    outcome: Literal["finished", "failed"] = "finished" if error is None else "failed"
    return Result(row, outcome, "" if error is None else str(error), time.monotonic() - start)


def write_report(results: Sequence[Result], planned: int, out: Path) -> None:
    """Write `report.md` and, if there are samples, `contact-sheet.png`.

    Raises:
        MachineError: disk full, no permission.
    """
    images = [(result.run.path.name, result.run.sheets[-1]) for result in results if result.run.sheets]
    if images:
        write_png(out / SHEET, contact_sheet(images))
    counts = {name: sum(result.outcome == name for result in results) for name in ("finished", "skipped", "failed")}
    counts["not begun"] = planned - len(results)
    lines = ["# Batch", "", ", ".join(f"{count} {name}" for name, count in counts.items() if count), ""]
    lines += [f"![Contact sheet]({SHEET})", ""] if images else []
    lines += ["| run | words | result | time |", "|---|---|---|---|"]
    for result in results:
        words = ", ".join(word for name, word in result.row.config.words().items() if name != "token")
        spent = duration(result.seconds) if result.seconds else ""
        lines.append(f"| {_cell(result.run.path.name)} | {_cell(words)} | {result.outcome} | {spent} |")
    for result in results:
        if result.outcome == "failed":
            failure = read_failure(result.run)
            log = failure.log if failure else []
            lines += ["", f"## {result.run.path.name} failed", "", result.reason, "", "```", *log, "```"]
    atomic_write(out / REPORT, "\n".join(lines) + "\n")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def contact_sheet(images: Sequence[tuple[str, Path]]) -> Image.Image:
    """Arrange the last sample sheets of runs in a square, each above the name of its run."""
    columns = math.ceil(math.sqrt(len(images)))
    side = min(THUMBNAIL, 15_000 // columns)
    cells = []
    for name, path in images:
        with Image.open(path) as image:
            cells.append(sheet([[ImageOps.contain(image.convert("RGB"), (side, side))]], columns=[name]))
    return sheet([cells[start : start + columns] for start in range(0, len(cells), columns)])
