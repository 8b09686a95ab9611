"""A worker: takes the jobs of a queue one after the other, and survives those that fail."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from unziplora.errors import Interrupted, MachineError, UnziploraError, UserError
from unziplora.jobs.claim import Claim
from unziplora.jobs.queue import Job, Queue
from unziplora.jobs.state import LOG, clear_failure, record_failure
from unziplora.models.kept import free_memory
from unziplora.runs.folder import RunFolder
from unziplora.utils.files import atomic_write, explained
from unziplora.utils.progress import Callback, Lines, Progress
from unziplora.utils.signals import STOP, caught
from unziplora.utils.threads import Periodic

Train = Callable[[RunFolder, Callback], object]
"""Trains a run to its end, from the step that it has reached."""

BEAT, POLL = 2.0, 2.0
"""Seconds between two heartbeats, and between two looks into an empty queue."""


SAME_PROCESS = 60.0
"""Seconds by which a process may seem to be born at another time: clocks are set, and its number is not given again so
soon."""


def execute(claim: Claim, train: Train, progress: Callback) -> Exception | None:
    """Train a claimed run with a log in its folder; return the error that it failed with, after recording it there.

    Raises:
        Interrupted, KeyboardInterrupt: asked to stop.
        MachineError: the error could not be recorded.
    """
    run = claim.run
    clear_failure(run)
    with explained(run.path / LOG):
        stream = (run.path / LOG).open("a", encoding="utf-8")
    lines = Lines(stream)

    def both(event: Progress) -> None:
        with suppress(OSError):  # on a full disk the training itself fails, and says why
            lines(event)
        progress(event)

    try:
        claim.check_attempts()
        train(run, both)
    except Interrupted:
        raise
    except Exception as error:
        details = str(error) if isinstance(error, UnziploraError) else traceback.format_exc()
        with suppress(OSError):
            print(details, file=stream, flush=True)
        record_failure(run, error)
        free_memory(error)  # a training that failed may hold the memory that the next one needs
        return error
    finally:
        with suppress(OSError):
            stream.close()
    return None


@dataclass
class Work:
    """Result of a worker.

    Attributes:
        finished: run folders.
        failed: reasons by run folder.
        stopped: True if the worker was asked to stop.
    """

    finished: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    stopped: bool = False


def work(
    queue: Queue,
    train: Train,
    progress: Callback,
    until_empty: bool = False,
    poll: float = POLL,
    after: Callable[[], None] = lambda: None,
) -> Work:
    """Take jobs and train them until the process is asked to stop; the current job then saves its step.

    Args:
        until_empty: stop when no job is left that nobody works on.
        poll: seconds between two looks into an empty queue.
        after: called after each job, which is no longer claimed then; its errors end the work.

    Raises:
        UserError: this is not the main thread, which alone can stop a training.
        MachineError: the queue or the reason of a failure cannot be written.
    """
    if threading.current_thread() is not threading.main_thread():
        raise UserError("a worker needs the main thread of a process: start `unziplora worker`")
    result, idle = Work(), False
    with caught(signal.default_int_handler, *STOP), _present(queue.folder):
        try:
            while True:
                with queue.claimed() as taken:
                    if taken is not None:
                        _do(queue, *taken, train, progress, result)
                if taken is not None:
                    after()
                if taken is None and until_empty:
                    return result
                if taken is None:
                    if not idle:
                        progress(Progress(message=f"waiting for jobs in {queue.folder}; Ctrl-C stops"))
                    time.sleep(poll)
                idle = taken is None
        except (Interrupted, KeyboardInterrupt):
            result.stopped = True
    return result


def workers(folder: Path) -> list[int]:
    """Return the processes on this machine that work on the queue of a folder; the marks of dead ones are removed."""
    numbers = []
    for mark in folder.glob(_mark("*")):
        number = mark.name.rpartition("-")[2]
        if not number.isdecimal() or mark.name != _mark(number):  # of a machine whose name begins like this one's
            continue
        with suppress(OSError):
            if _lives(int(number), mark.read_text()):
                numbers.append(int(number))
            else:
                mark.unlink()
    return numbers


def _mark(number: int | str) -> str:
    """Return the name of the file that a worker on this machine leaves in the runs folder."""
    return f".worker-{socket.gethostname()}-{number}"


def _lives(number: int, born: str) -> bool:
    """Return True if the process that was born at a time is alive; its number may belong to another one by now."""
    try:
        process = psutil.Process(number)
        return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - float(born)) < SAME_PROCESS
    except (psutil.Error, ValueError):
        return False


@contextmanager
def _present(folder: Path) -> Iterator[None]:
    """Leave a mark in the runs folder while this process works on its queue."""
    mark = folder / _mark(os.getpid())
    with suppress(MachineError):  # where the queue cannot be written, the first job says so
        atomic_write(mark, str(psutil.Process().create_time()))
    try:
        yield
    finally:
        with suppress(OSError):
            mark.unlink()


def _do(queue: Queue, job: Job, claim: Claim, train: Train, progress: Callback, result: Work) -> None:
    """Do one job; a stop that was asked for this job alone does not stop the worker."""

    def tell(message: str) -> None:
        progress(Progress(message=f"job {job.number}, {job.run.path}: {message}"))

    tell("started")
    beat = Heartbeat(queue, job, claim)
    try:
        with beat:
            error = execute(claim, train, progress)
    except (Interrupted, KeyboardInterrupt):
        if not beat.request:
            tell("stopped")
            raise
        tell(f"stopped on request ({beat.request})")
        return
    if error is None:
        result.finished.append(str(job.run.path))
        tell("finished")
    else:
        result.failed[str(job.run.path)] = str(error)
        tell(f"failed: {error}")


class Heartbeat(Periodic):
    """A thread that renews the claim to a job, and stops the job as Ctrl-C does when the queue asks for it."""

    def __init__(self, queue: Queue, job: Job, claim: Claim) -> None:
        super().__init__(BEAT)
        self.queue, self.job, self.claim, self.request = queue, job, claim, ""

    def tick(self) -> bool:
        self.claim.beat()
        try:
            self.request = self.queue.request(self.job)
        except UnziploraError:
            return True  # the worker meets the fault when it takes the next job
        if self.request:
            signal.raise_signal(signal.SIGTERM)
        return not self.request
