"""Temporary signal handlers."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

STOP = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name)]
"""Requests to stop: Ctrl-C, a polite kill, a closed terminal."""


@contextmanager
def caught(handler: Callable[[int, Any], object], *numbers: signal.Signals) -> Iterator[None]:
    """Temporarily handle signals by a function, but not those that the process ignores, as under nohup.

    Does nothing outside the main thread, where Python allows no handlers.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():
        kept = (signal.SIG_IGN, None)  # None: a handler that is not Python's
        before = {number: former for number in numbers if (former := signal.getsignal(number)) not in kept}
    try:
        for number in before:
            signal.signal(number, handler)
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)


@contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """Yield an event that the first request to stop sets, so that the step in progress is finished.

    A second request stops at once.
    """
    stopped = threading.Event()

    def on_signal(number: int, frame: object) -> None:
        if stopped.is_set():
            raise KeyboardInterrupt
        stopped.set()

    with caught(on_signal, *STOP):
        yield stopped
