"""Runs that are killed at random moments, and must end like one that was not."""

from __future__ import annotations

import os
import random
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from reliability.campaign import Failure
from reliability.processes import forked
from reliability.workshop import METHODS, Method, Workshop, check_equal, learned, pick, recover, use_cache
from unziplora.runs.folder import RunFolder

OPERATIONS = {"open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate", "shutil.rmtree"}
"""Python's audit events of file operations."""


class Kills:
    """Short runs of every method, killed once to three times, then resumed or started again.

    Half of the kills come after a random time, measured in CPU seconds so that a busy machine does not shift it. The
    other half come before a random file operation below the case's folder.
    """

    name = "kills"
    seconds = 120.0

    def __init__(self, shop: Workshop) -> None:
        self.shop = shop
        self.references: dict[str, dict[str, Tensor]] = {}
        self.durations: dict[str, float] = {}
        self.operations: dict[str, int] = {}
        for method in METHODS:
            folder = shop.folder / "uninterrupted" / method.name

            def run(method: Method = method, folder: Path = folder) -> str:
                use_cache(folder / "cache")
                count = watch_operations(folder, lambda number: None)
                before = cpu_seconds()
                shop.train(method, shop.config(method, folder / "run"))
                return f"{cpu_seconds() - before} {count()}"

            ending = forked(run)
            if not ending.text:
                raise RuntimeError(f"the uninterrupted run of {method.name} failed: {ending}")
            duration, operations = ending.text.split()
            self.durations[method.name], self.operations[method.name] = float(duration), int(operations)
            self.references[method.name] = learned(RunFolder(folder / "run"))

    def run(self, number: int, draw: random.Random, folder: Path) -> list[str]:
        """Kill a run, then recover it."""
        method = pick(draw)
        use_cache(folder / "cache")
        config = self.shop.config(method, folder / "run")
        counts = []
        for _ in range(draw.choice((1, 1, 2, 3))):
            guard = self._guard(method, draw, folder)
            ending = forked(lambda: recover(self.shop, method, config), guard)
            if ending.error:
                raise Failure("lost" if "Failure" in ending.error else "fault", ending.error)
            if ending.signal is None:
                break
            counts.append("kills")
        how = recover(self.shop, method, config)
        check_equal(RunFolder(config.out), self.references[method.name])
        return [*counts, f"{method.name}: {how}"]

    def _guard(self, method: Method, draw: random.Random, folder: Path) -> Callable[[], None]:
        """Return a function that arranges the death of the process that calls it."""
        moment = draw.uniform(0, self.durations[method.name])
        operation = draw.randint(1, self.operations[method.name])
        if draw.random() < 0.5:
            return lambda: die_after(moment)
        return lambda: die_before(operation, folder)


def cpu_seconds() -> float:
    """Return the CPU seconds that this process has taken."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def die_after(seconds: float) -> None:
    """Let the system end this process after CPU seconds; nothing in it learns of that."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, max(seconds, 1e-3))


def die_before(operation: int, folder: Path) -> None:
    """Kill this process before its n-th file operation in a folder."""

    def kill(number: int) -> None:
        if number == operation:
            os.kill(os.getpid(), signal.SIGKILL)

    watch_operations(folder, kill)


def watch_operations(folder: Path, call: Callable[[int], None]) -> Callable[[], int]:
    """Call a function before every file operation of this process in a folder; return a function that counts them."""
    count, inside = 0, str(folder)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event in OPERATIONS and any(inside in str(argument) for argument in arguments):
            count += 1
            call(count)

    sys.addaudithook(hook)
    return lambda: count
