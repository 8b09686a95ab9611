"""The worker process of the studio: one, unless another one works on the same runs folder."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from filelock import FileLock

from unziplora.errors import MachineError
from unziplora.jobs.worker import workers
from unziplora.utils.files import explain

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
        self.lock = threading.Lock()

    def present(self) -> bool:
        """Return True if a process works on the queue, or the one that was just started still lives."""
        starting = self.process is not None and self.process.poll() is None
        return bool(workers(self.runs)) or starting

    def ensure(self) -> None:
        """Start a worker unless there is one.

        Raises:
            MachineError: the process cannot be started.
        """
        if not self.allowed:
            return
        with self.lock, FileLock(self.runs / ".studio" / "worker.lock"):  # of this studio's tabs, and of other studios
            if self.present():
                return
            command = [sys.executable, "-m", "unziplora", "worker", "--runs", str(self.runs), "--quiet"]
            log = self.runs / ".studio" / "worker.log"
            try:
                with log.open("ab") as output:
                    self.process = subprocess.Popen(
                        command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
                        env={**os.environ, "HF_HUB_DISABLE_TELEMETRY": "1"},
                    )  # fmt: skip
            except OSError as error:
                raise explain(log, error) from None
            deadline = time.monotonic() + _PATIENCE
            while not workers(self.runs) and time.monotonic() < deadline:
                if self.process.poll() is not None:
                    raise MachineError(f"the worker ended at once; see {log}")
                time.sleep(0.1)

    def stop(self) -> None:
        """Stop the worker that this studio started; it saves the step of its job first."""
        if self.process is not None and self.process.poll() is None:
            with suppress(OSError):
                self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(_PATIENCE)
