"""Text streams that may lose their readers while a long job writes to them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast


class SteadyStream:
    """A text stream that drops everything after its first failed write, so that the work behind it goes on.

    Attributes:
        error: the reason of that failure: the reader has gone, the disk is full, the terminal is closed.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.error: Exception | None = None

    def write(self, text: str) -> int:
        """Write, or drop the text."""
        return self._try("write", text) or len(text)

    def flush(self) -> None:
        """Write what is buffered, or drop it."""
        self._try("flush")

    def isatty(self) -> bool:
        """Return True for a terminal."""
        return bool(self._try("isatty"))

    def _try(self, name: str, *args: str) -> Any:
        if self.error is None:
            try:
                return getattr(self.stream, name)(*args)
            except UnicodeError:  # a ValueError too
                raise
            except (OSError, ValueError) as error:  # ValueError: the stream object was closed
                self.error = error
        return None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def steady_output() -> Iterator[SteadyStream]:
    """Temporarily make stdout and stderr steady, even if the process began without them; yield stdout.

    A closed file descriptor is opened on nothing, because the next file to be opened would take its place.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # becomes the lowest free number
    former = sys.stdout, sys.stderr
    out, err = (SteadyStream(stream or open(os.devnull, "w")) for stream in former)  # noqa: SIM115 (until the end)
    sys.stdout, sys.stderr = cast(TextIO, out), cast(TextIO, err)
    try:
        yield out
    finally:
        sys.stdout, sys.stderr = former
        for stream in (out, err):
            if stream.error is not None:
                with suppress(OSError, ValueError):  # what is still buffered must not fail again at exit
                    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
