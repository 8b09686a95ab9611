"""Cost of a training: its seconds and its peak memory, recorded in its run folder."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import NamedTuple

from unziplora.errors import UserError
from unziplora.jobs.trainings import Trainer
from unziplora.runs.folder import RunFolder
from unziplora.utils.files import atomic_write
from unziplora.utils.inputs import read_json
from unziplora.utils.progress import Callback, Progress

COST = ".cost.json"
"""File of a run folder with the seconds of its training and its peak memory in bytes."""

NOTED_EVERY = 60.0
"""Seconds between two notes of the cost, so that a kill loses little of it."""


class Cost(NamedTuple):
    """Seconds of a training, and its peak memory in bytes."""

    seconds: float = 0.0
    memory: int = 0


@dataclass(frozen=True)
class Metered:
    """Function that trains a run and records the cost in its folder."""

    trainer: Trainer

    def __call__(self, run: RunFolder, progress: Callback) -> None:
        """Train a run to its end. Errors as in `Trainer`."""
        earlier, start = read_cost(run) or Cost(), time.monotonic()
        peak, noted = earlier.memory, start

        def note() -> None:
            cost = Cost(round(earlier.seconds + time.monotonic() - start, 2), peak)
            atomic_write(run.path / COST, json.dumps(cost._asdict()))

        def watch(event: Progress) -> None:
            nonlocal peak, noted
            peak = max(peak, event.memory_bytes or 0)
            if time.monotonic() - noted > NOTED_EVERY:
                noted = time.monotonic()
                note()
            progress(event)

        try:
            self.trainer(run, watch)
        finally:
            note()


def read_cost(run: RunFolder) -> Cost | None:
    """Return what a training cost so far; None if another worker trained it or nothing is recorded."""
    try:
        return Cost(**read_json(run.path / COST))
    except (OSError, UserError, TypeError):
        return None
