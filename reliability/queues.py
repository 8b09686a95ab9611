"""Workers of a queue that are killed at random moments: every job must be finished exactly once."""

from __future__ import annotations

import fcntl
import os
import random
import signal
import time
from pathlib import Path

from reliability.campaign import Failure
from reliability.kills import die_before
from unziplora.config.split import SplitConfig
from unziplora.jobs.queue import Queue
from unziplora.jobs.state import state_of
from unziplora.jobs.worker import work
from unziplora.runs.folder import RunFolder
from unziplora.utils.progress import Callback

JOBS, STEPS, WORKERS, ROUNDS = 8, 4, 2, 100
KILLS = "kills of workers"
KILLED = (signal.SIGKILL, signal.SIGALRM)


class Queues:
    """A queue of jobs of milliseconds, and two workers at a time that are killed until no job is left.

    Half of the kills come after a random time, the other half before a random file operation.
    """

    name = "queues"
    seconds = 60.0

    def run(self, number: int, draw: random.Random, folder: Path) -> list[str]:
        """Kill workers until all jobs are done, then check that each was done once."""
        queue, violations, counts = Queue(folder / "runs"), folder / "violations", []
        words = {"images": [Path("cat.png")], "content": "cat", "style": "ink", "base": "bundled", "steps": STEPS}
        runs = [queue.submit(SplitConfig(out=queue.folder / str(job), **words)).run for job in range(JOBS)]
        while queue.jobs():
            if counts.count(KILLS) > ROUNDS * WORKERS:
                states = [job.state for job in queue.jobs()]
                raise Failure("hang", f"{len(states)} jobs are left after {counts.count(KILLS)} kills: {states}")
            for child in [serve(queue, violations, draw, folder) for _ in range(WORKERS)]:
                _, status = os.waitpid(child, 0)
                if os.WIFSIGNALED(status) and os.WTERMSIG(status) in KILLED:
                    counts.append(KILLS)
                elif status:
                    raise Failure("fault", f"a worker ended with status {status}")
            for job in queue.jobs():
                if job.state == "failed":
                    queue.retry(job.number)
                    counts.append("jobs given up after three kills, and retried")
        if violations.exists():
            raise Failure("silently wrong", violations.read_text("utf-8"))
        for run in runs:
            steps = [line["step"] for line in run.read_log()]
            if state_of(run) != "finished" or steps != list(range(1, STEPS + 1)):
                raise Failure("lost", f"{run.path}: {state_of(run)}, steps {steps}")
        return [*counts, *["jobs finished once"] * JOBS]


def serve(queue: Queue, violations: Path, draw: random.Random, folder: Path) -> int:
    """Start a worker that is killed at a random moment, if it is not done before; return its number."""
    moment, operation = draw.uniform(0.001, 0.2), draw.randint(1, 60) if draw.random() < 0.5 else None
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        if operation is None:
            signal.setitimer(signal.ITIMER_REAL, moment)
        else:
            die_before(operation, folder)
        work(queue, lambda run, progress: train(run, progress, violations), lambda event: None, until_empty=True)
        code = 0
    finally:
        os._exit(code)


def train(run: RunFolder, progress: Callback, violations: Path) -> None:
    """Log the missing steps and write the card; note a run that is trained twice, at once or again."""

    def note(fault: str) -> None:
        with violations.open("a", encoding="utf-8") as file:
            file.write(f"{run.path.name} {fault}\n")

    with (run.path / "busy").open("w") as busy:
        try:
            fcntl.flock(busy, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            note("is trained by two processes at once")
        if run.card.exists():
            note("is trained again")
        for step in range(len(run.read_log()), STEPS):
            time.sleep(0.005)
            run.log(step=step + 1)
        run.card.write_text("# cat")
