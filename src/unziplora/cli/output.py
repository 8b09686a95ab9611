"""Output of commands: one result on stdout, everything else on stderr, and no traceback for expected faults."""

from __future__ import annotations

import errno
import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from types import FrameType
from typing import TYPE_CHECKING, Any

from unziplora.errors import Interrupted, MachineError, UnziploraError, UserError, disk_full, first_line, out_of_memory
from unziplora.utils.text import printable

if TYPE_CHECKING:
    from pydantic import BaseModel

    from unziplora.config.training import TrainingConfig


def debugging() -> bool:
    """Check whether faults keep their tracebacks (UNZIPLORA_DEBUG=1)."""
    return os.environ.get("UNZIPLORA_DEBUG", "") not in ("", "0")


def note(text: str) -> None:
    """Print a line for people, on stderr."""
    print(printable(text), file=sys.stderr, flush=True)


def emit(result: BaseModel | dict[str, Any], text: str, as_json: bool) -> None:
    """Print a command's result on stdout: as one JSON document, or as text."""
    if as_json:
        data = result if isinstance(result, dict) else result.model_dump(mode="json")
        text = json.dumps(data, indent=2, ensure_ascii=False, default=str)
    print(printable(text))


def stdout_to_stderr() -> AbstractContextManager[object]:
    """Redirect stdout to stderr, so that messages of libraries do not mix with the result."""
    return redirect_stdout(sys.stderr)


@contextmanager
def warnings_shown(quiet: bool = False) -> Iterator[None]:
    """Show each of our own warnings once, as one line; those of the libraries only while debugging."""
    shown: set[str] = set()

    def show(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
        ours = category is UserWarning and _warner().partition(".")[0] == "unziplora"
        if ((ours and not quiet) or debugging()) and str(message) not in shown:
            shown.add(str(message))
            note(f"warning: {message}")

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show
        yield


def _warner() -> str:
    """Find the module that issued a warning, whatever line the warning points to."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_globals.get("__name__") == "warnings":
        frame = frame.f_back
    return str(frame.f_globals.get("__name__")) if frame else ""


@contextmanager
def memory_advice(config: TrainingConfig) -> Iterator[None]:
    """Replace an out-of-memory error by one that names the next smaller setting."""
    try:
        yield
    except Exception as error:
        if not out_of_memory(error) or debugging():
            raise
        from unziplora.models.sizes import inspect_base
        from unziplora.training.memory import smaller

        try:
            side = inspect_base(config.base).resolution
        except UserError:  # a plain sum of LoRAs needs no base; its name may stand for nothing on this machine
            side = 1024
        advice = smaller(config, side)
        raise MachineError(
            f"not enough memory ({first_line(error)}). "
            + (f"Next smaller setting: {advice}" if advice else "Choose a smaller base, or a machine with more memory")
        ) from error


_OF_THE_MACHINE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ESTALE)
"""Errors of the system that no code can foresee, wherever a file is opened."""


def report_error(error: BaseException, as_json: bool) -> int:
    """Print an exception as one message and return the exit code."""
    if isinstance(error, UnziploraError):
        code, text = error.exit_code, str(error)
    elif isinstance(error, KeyboardInterrupt):
        code, text = 130, "interrupted"
    elif out_of_memory(error):
        code, text = 1, f"not enough memory ({first_line(error)}): close other programs, or choose smaller settings"
    elif disk_full(error):
        code, text = 1, f"the disk is full ({first_line(error)}): free some space, or write to another disk"
    elif isinstance(error, OSError) and error.filename and error.errno in _OF_THE_MACHINE:
        code, text = 1, f"{error.filename}: {error.strerror}; check its permissions and its disk"
    else:
        code = 1
        text = (
            f"a fault in unziplora itself: {type(error).__name__}: {first_line(error)}. "
            "Set UNZIPLORA_DEBUG=1 and run again for the details to report"
        )
    prefix = "" if isinstance(error, (Interrupted, KeyboardInterrupt)) else "error: "
    note(prefix + text)
    if as_json:
        print(printable(json.dumps({"error": text, "exit_code": code}, ensure_ascii=False)))
    return code
