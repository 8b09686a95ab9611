"""Trainings of milliseconds for the tests of the queue: they begin, log, save and finish a run as real ones do."""

import os
import time
from collections.abc import Callable
from pathlib import Path

from unziplora.config.split import SplitConfig
from unziplora.errors import UserError
from unziplora.runs.folder import RunFolder
from unziplora.utils.progress import Callback, Progress

STEPS = 4


def recipe(out: Path, **changes: object) -> SplitConfig:
    words = {"images": [Path("cat.jpg")], "content": "cat", "style": "ink", "base": "bundled", "steps": STEPS}
    return SplitConfig(**{**words, "out": out, **changes})


def begin(path: Path, **changes: object) -> RunFolder:
    with RunFolder.created(path, recipe(path, **changes)) as run:
        return run


def steps_done(run: RunFolder) -> int:
    return len([line for line in run.read_log() if "step" in line])


def train(run: RunFolder, progress: Callback, seconds: float = 0.0) -> None:
    """Log the steps that are missing, and write the card."""
    for step in range(steps_done(run), STEPS):
        time.sleep(seconds / STEPS)
        run.log(step=step + 1)
        progress(Progress(step + 1, STEPS, 0.5))
    run.card.write_text("# cat")


class FakeTrainer:
    """Trains every run but those of owls."""

    def __call__(self, run: RunFolder, progress: Callback) -> None:
        if run.path.name == "owl":
            raise UserError("owl.png: no such image")
        train(run, progress)


def witnessed(violations: Path, inner: Callable[[RunFolder, Callback], None]) -> Callable[[RunFolder, Callback], None]:
    """Note each training of a finished run, and each training of a run that another process is training."""
    import fcntl

    def trained(run: RunFolder, progress: Callback) -> None:
        with (run.path / "busy").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                violations.open("a").write(f"{run.path.name}: two at once\n")
            if run.card.exists():
                violations.open("a").write(f"{run.path.name}: again\n")
            inner(run, progress)

    return trained


def in_child(work: Callable[[], object]) -> int:
    """Run a function in a forked process, which ends without the test's own clean-up; return its number."""
    child = os.fork()
    if not child:
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return child
