"""Functions that tests run as Ray tasks in place of `unziplora.jobs.remote.train_run`."""

import os
import signal
import time
from dataclasses import replace

import ray
from fake_jobs import steps_done

from unziplora.errors import Interrupted
from unziplora.jobs import remote
from unziplora.jobs.cluster import Reporter
from unziplora.jobs.remote import Parcel, Report
from unziplora.runs.folder import RunFolder
from unziplora.utils.progress import Callback, Progress
from unziplora.utils.signals import stop_requests

STEPS = 60
"""Steps of a fake run that takes six seconds."""


def elsewhere(parcel: Parcel) -> Parcel:
    """Return the parcel as a node sees it that does not share the disk."""
    return replace(parcel, mark=f"{parcel.mark}-elsewhere")


def killed_once(parcel: Parcel, progress: Reporter) -> Report:
    """Train in earnest, but die in the eighth step of the first attempt.

    The run "there" shares no disk; the run "unharmed" is not killed.
    """
    from unziplora.training.trainer import Trainer

    step, first = Trainer.step, parcel.run.with_name(f"{parcel.run.name}.killed")

    def deadly(self: Trainer, number: int) -> object:
        if number == 8 and not first.exists() and parcel.run.name != "unharmed":
            time.sleep(3)  # the checkpoint after step 6 is on its way
            first.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, number)

    Trainer.step = deadly  # type: ignore[method-assign]
    try:
        return remote.train_run(elsewhere(parcel) if parcel.run.name == "there" else parcel, progress)
    finally:
        Trainer.step = step  # type: ignore[method-assign]


def slow(parcel: Parcel, progress: Reporter) -> Report:
    """Save a step every tenth of a second, far from the driver's disk, and note node and first step."""
    remote.trainer = slow_training
    node = ray.get_runtime_context().get_node_id()
    with parcel.run.with_name("attempts").open("a") as file:
        file.write(f"{parcel.run.name} {node}\n")
    return remote.train_run(elsewhere(parcel), progress)


def slow_training(run: RunFolder, progress: Callback) -> None:
    saved = max(run.steps(), default=0)
    run.rewind_log(saved)
    progress(Progress(0, 0, message=f"begun at step {saved}"))
    steps = STEPS if not (run.path / "hurry").exists() else saved + 2
    with stop_requests() as stopped:
        for step in range(saved, steps):
            time.sleep(0.1)
            run.log(step=step + 1)
            run.checkpoint(step + 1, lambda file: file.write(b"state"))
            progress(Progress(step + 1, STEPS, 0.5))
            (run.path / "hurry").write_text("the next attempt takes two steps")
            if stopped.is_set():
                raise Interrupted(f"stopped after step {step + 1}")
    assert steps_done(run) == steps
    run.card.write_text("# cat")
