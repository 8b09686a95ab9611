"""The command `unziplora split` as a process in its own environment, followed line by line from a node."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import IO, Any

from unziplora.errors import MachineError, UserError

PYTHON = "UNZIPLORA_PYTHON"
"""Environment variable with the Python that runs the command; the default is ComfyUI's own."""

SECONDS_TO_SAVE = 120
"""Time for a stopped run to finish its step and save."""

_STEP = re.compile(r"step (\d+)/(\d+)")
_WINDOWS = os.name == "nt"

Report = Callable[[int, int], None]
"""Callback with (finished, total) steps."""


def command(arguments: Sequence[str]) -> list[str]:
    """Return the command line of `unziplora` with arguments.

    Raises:
        UserError: the environment variable names no file.
    """
    python = os.environ.get(PYTHON) or sys.executable
    if not Path(python).is_file():
        raise UserError(f"{PYTHON} is {python}, which is not a file: set it to the python of unziplora's environment")
    return [python, "-m", "unziplora", *arguments]


def run(arguments: Sequence[str], report: Report, check_stopped: Callable[[], None]) -> dict[str, Any]:
    """Run `unziplora` with arguments and `--json`, and return its result; nothing is downloaded.

    Args:
        report: called for each line of progress, in this thread.
        check_stopped: called several times a second; if it raises, the process is asked to save and to end.

    Raises:
        UserError: the command refused its settings.
        MachineError: it failed; the message has its last lines.
    """
    process = subprocess.Popen(
        command([*arguments, "--json"]),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        errors="replace",
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUTF8": "1"},
        # on Windows only a process group of its own can be asked to stop
        creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
    )
    lines: Queue[str] = Queue()
    last: deque[str] = deque(maxlen=30)
    output: list[str] = []
    readers = [_read(process.stderr, lines.put), _read(process.stdout, output.append)]
    try:
        # the process may end before its last lines are read
        while process.poll() is None or readers[0].is_alive() or not lines.empty():
            check_stopped()
            try:
                line = lines.get(timeout=0.2).rstrip()
            except Empty:
                continue
            last.append(line)
            if step := _STEP.match(line):
                report(int(step[1]), int(step[2]))
    finally:
        _stop(process)
        for reader in readers:
            reader.join()
    return _result(process.returncode, "".join(output), last)


def _read(stream: IO[str] | None, store: Callable[[str], object]) -> Thread:
    assert stream is not None

    def copy() -> None:
        with stream:
            for line in stream:
                store(line)

    thread = Thread(target=copy, daemon=True)
    thread.start()
    return thread


def _stop(process: subprocess.Popen[str]) -> None:
    """Ask a running process to save and to end; kill it if it does not."""
    if process.poll() is not None:
        return
    # not SIGINT: shells make what a script starts in the background ignore it
    process.send_signal(signal.CTRL_BREAK_EVENT if _WINDOWS else signal.SIGTERM)  # type: ignore[attr-defined,unused-ignore]
    try:
        process.wait(SECONDS_TO_SAVE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _result(code: int, output: str, last: Iterable[str]) -> dict[str, Any]:
    try:
        result = json.loads(output)
    except ValueError:
        result = None
    error = result.get("error") if isinstance(result, dict) else "it gave no result"
    if code == 0 and not error:
        return result
    if code == UserError.exit_code and isinstance(result, dict):
        raise UserError(str(error))
    log = "\n".join(last) or "(none)"
    raise MachineError(f"unziplora failed (exit code {code}): {error}\nIts last lines:\n{log}")
