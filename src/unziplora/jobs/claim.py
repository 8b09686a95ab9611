"""The process that works on a run, recognized by its lock or, on drives without locks, by its heartbeat."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from unziplora.errors import MachineError
from unziplora.runs.folder import LOCK, LOCK_OWNER, RunFolder, try_lock
from unziplora.utils.files import explain

HEARTBEAT = 60.0
"""Age in seconds at which a heartbeat counts as stopped."""

ATTEMPTS = 3
"""Processes that may be killed on a run one after the other, each without a step of progress."""

CLAIM, OWNER = ".claim", ".claim.json"
_PAIRS = ((CLAIM, OWNER), (LOCK, LOCK_OWNER))  # of a worker before and while it trains; of any training


class Claim:
    """The claim of this process to a run. The system releases it if the process dies.

    The file of a claim that was not given back stays, and counts the processes that were killed on the run.

    Attributes:
        attempts: number of the present attempt since the run last progressed.
    """

    def __init__(self, run: RunFolder) -> None:
        self.run, self.owner, self.held, self.attempts = run, run.path / OWNER, False, 0
        self.lock = FileLock(run.path / CLAIM, fallback_to_soft=False)

    def acquire(self) -> bool:
        """Claim the run; return False if another process works on it.

        Raises:
            MachineError: disk full, no permission.
        """
        if not self.run.path.is_dir() or is_worked_on(self.run):
            return False
        if try_lock(self.lock, self.run.path) is False:  # on drives without locks, the heartbeat must do
            return False
        try:
            self.begin()
        except OSError as error:
            self.lock.release()
            raise explain(self.run.path, error) from None
        self.held = True
        return True

    def begin(self) -> None:
        """Record the beginning of an attempt."""
        earlier, reached = self._read(), _reached(self.run)
        before = earlier.get("reached", [-1, -1])
        stuck = all(now <= then for now, then in zip(reached, before, strict=True))
        self.attempts = earlier.get("attempts", 0) + 1 if stuck else 1
        about = {"process": os.getpid(), "machine": socket.gethostname(), "since": time.time()}
        about |= {"attempts": self.attempts, "reached": [*map(max, reached, before)]}
        self.owner.write_text(json.dumps(about))

    def check_attempts(self) -> None:
        """Refuse an attempt at a run on which too many processes were killed.

        Raises:
            MachineError: they made no progress.
        """
        if self.attempts > ATTEMPTS:
            raise MachineError(
                f"its process was killed {ATTEMPTS} times without a step of progress, most likely because memory ran "
                "out: choose smaller settings, or try it again on a machine with more memory"
            )

    def _read(self) -> dict[str, Any]:
        """Read the claim that a killed process left; one that is damaged counts as none."""
        try:
            claim = json.loads(self.owner.read_text())
            return claim if len(claim["reached"]) == 2 and claim["attempts"] > 0 else {}
        except (OSError, ValueError, TypeError, KeyError):
            return {}

    def beat(self) -> None:
        """Renew the heartbeat."""
        with suppress(OSError):  # the folder may have been deleted
            os.utime(self.owner)

    def release(self) -> None:
        """Give the run back, if this process has it."""
        if self.held:
            with suppress(OSError):
                self.owner.unlink(missing_ok=True)
            self.lock.release()
            self.held = False


def _reached(run: RunFolder) -> tuple[int, int]:
    """Return the last step in the log of a run, and the time of its newest checkpoint: phases log no steps."""
    steps = [line["step"] for line in run.read_log()[-1:] if "step" in line]
    checkpoints = run.path.rglob(f"{run.checkpoints.name}/step-*")  # each of several seeds has its own
    times = [path.stat().st_mtime_ns for path in checkpoints]
    return max(steps, default=0), max(times, default=0)


def is_worked_on(run: RunFolder) -> bool:
    """Return True if a process works on a run."""
    return any((run.path / owner).exists() and _is_held(run, lock, owner) for lock, owner in _PAIRS)


def _is_held(run: RunFolder, lock: str, owner: str) -> bool:
    """Return True if a lock is held, or if there are no locks here and its owner was active in the last minute."""
    try:
        return _try_shared(run.path / lock)
    except FileNotFoundError:
        return False
    except (OSError, NotImplementedError):
        beats = [path.stat().st_mtime for path in (run.path / owner, run.log_file) if path.exists()]
        return time.time() - max(beats, default=0.0) < HEARTBEAT


def _try_shared(lock: Path) -> bool:
    """Return True if a lock is held. A shared lock is tried, so that those who look do not see each other."""
    if sys.platform == "win32":
        probe = FileLock(lock)
        try:
            probe.acquire(blocking=False)
        except Timeout:
            return True
        probe.release()
        return False
    import fcntl

    with lock.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
