"""Work in forked processes, which start at once because everything is loaded in their parent already."""

from __future__ import annotations

import os
import resource
import signal
import traceback
from collections.abc import Callable
from dataclasses import dataclass

MEMORY = 4 << 30
"""Bytes that a guarded process may take on top of what its parent takes."""


@dataclass(frozen=True)
class Ending:
    """End of a forked process: the text that its work returned, its traceback, or the signal that ended it."""

    text: str = ""
    error: str = ""
    signal: int | None = None


def forked(work: Callable[[], str], guard: Callable[[], None] = lambda: None) -> Ending:
    """Run a function in a forked process and wait for its end.

    Args:
        guard: called first in the process, to set limits.
    """
    read, write = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            os.close(read)
            guard()
            message = "+" + work()
        except BaseException:
            message = "-" + traceback.format_exc()
        with open(write, "w", encoding="utf-8", errors="replace") as pipe:
            pipe.write(message)
        os._exit(0)
    os.close(write)
    with open(read, encoding="utf-8") as pipe:
        message = pipe.read()
    _, status = os.waitpid(process, 0)
    if os.WIFSIGNALED(status):
        return Ending(signal=os.WTERMSIG(status))
    return Ending(text=message[1:]) if message.startswith("+") else Ending(error=message[1:])


def silent() -> None:
    """Discard everything that this process prints."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)


def limit(seconds: float) -> None:
    """End this process by SIGPROF after CPU seconds, and by SIGALRM after ten times as long without any progress."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.alarm(round(10 * seconds))
    with open("/proc/self/statm", encoding="ascii") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, resource.RLIM_INFINITY))


def side_by_side(work: Callable[[int], None], jobs: int) -> None:
    """Run `work(0)` … `work(jobs - 1)` in one process each and wait for all.

    Raises:
        RuntimeError: one of them failed.
    """
    processes = []
    for job in range(jobs):
        process = os.fork()
        if process == 0:
            try:
                work(job)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        processes.append(process)
    if any(os.waitpid(process, 0)[1] for process in processes):
        raise RuntimeError("a process of the campaign failed; its traceback is above")
