"""Threads that repeat something during a long job."""

from __future__ import annotations

import threading
from typing import TypeVar

P = TypeVar("P", bound="Periodic")


class Periodic:
    """Context in which a thread calls `tick` again and again.

    Attributes:
        seconds: between two calls.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self: P) -> P:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def tick(self) -> bool:
        """Do what is repeated; return False to end."""
        raise NotImplementedError

    def _run(self) -> None:
        while not self._ended.wait(self.seconds) and self.tick():
            pass
