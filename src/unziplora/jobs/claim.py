"""The process that works on a run, known by its lock, or on drives without locks by its heartbeat."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from unziplora.runs.folder import LOCK, LOCK_OWNER, RunFolder, try_lock
from unziplora.utils.files import explain

HEARTBEAT = 60.0
"""Age in seconds at which a heartbeat counts as stopped."""

CLAIM, OWNER = ".claim", ".claim.json"
_PAIRS = ((CLAIM, OWNER), (LOCK, LOCK_OWNER))  # of a worker before and while it trains; of any training


class Claim:
    """The claim of this process to a run. The system releases it if the process dies."""

    def __init__(self, run: RunFolder) -> None:
        self.run, self.owner, self.held = run, run.path / OWNER, False
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
            about = {"process": os.getpid(), "machine": socket.gethostname(), "since": time.time()}
            self.owner.write_text(json.dumps(about))
        except OSError as error:
            self.lock.release()
            raise explain(self.run.path, error) from None
        self.held = True
        return True

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
