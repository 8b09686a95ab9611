"""The worker process of the studio: one, unless another one works on the same runs folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from filelock import FileLock

from unziplora.jobs.worker import workers
from unziplora.utils.files import explained

_PATIENCE = 60.0
"""Seconds that a new worker may need until it leaves its mark."""


class Workers:
    """Starts the worker of a runs folder when there is work and nobody does it. It outlives a studio that is killed."""

    def __init__(self, runs: Path, allowed: bool = True) -> None:
        """Watch a folder.

        Args:
            allowed: start a worker if there is none; otherwise somebody else has to.
        """
        self.runs, self.allowed = runs, allowed
        self.process: subprocess.Popen[bytes] | None = None
        self.log = runs / ".studio" / "worker.log"
        self.lock = threading.Lock()  # of this studio's tabs
        self.starting = FileLock(runs / ".studio" / "worker.lock", thread_local=False)  # of other studios

    def present(self) -> bool:
        """Return True if a process works on the queue, or the one that was just started still lives."""
        starting = self.process is not None and self.process.poll() is None
        return bool(workers(self.runs)) or starting

    def ensure(self) -> None:
        """Start a worker unless there is one; do not wait until it has imported its libraries.

        Raises:
            MachineError: the process cannot be started.
        """
        with self.lock:
            if not self.allowed or self.present():
                return
            self.starting.acquire()
            try:
                self.process = None if self.present() else self._started()
            finally:
                threading.Thread(target=self._release_when_marked, args=(self.process,), daemon=True).start()

    def _started(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "unziplora", "worker", "--runs", str(self.runs), "--quiet"]
        with explained(self.log), self.log.open("ab") as output:
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
                creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),  # of Windows, for Ctrl-Break
                env={**os.environ, "HF_HUB_DISABLE_TELEMETRY": "1"},
            )  # fmt: skip

    def _release_when_marked(self, process: subprocess.Popen[bytes] | None) -> None:
        """Release the lock as soon as other studios can see the worker, or there is none."""
        deadline = time.monotonic() + _PATIENCE
        while process is not None and process.poll() is None and time.monotonic() < deadline:
            if workers(self.runs):
                break
            time.sleep(0.1)
        self.starting.release()

    def stop(self) -> None:
        """Stop the worker that this studio started; it saves the step of its job first."""
        if self.process is not None and self.process.poll() is None:
            with suppress(OSError):
                self.process.send_signal(getattr(signal, "CTRL_BREAK_EVENT", signal.SIGTERM))
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(_PATIENCE)
