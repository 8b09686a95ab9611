"""Crashes on purpose: what a kill before each file operation leaves behind, and interference with operations.

states = snapshots(folder, lambda: split(config), copies)  # one run, a folder for every moment to be killed in

with watched(folder, strike_at(7, fill_disk)):
    split(config)  # the disk is full from the eighth operation below the folder on
"""

import builtins
import errno
import io
import os
import re
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from unziplora.errors import UnziploraError

KILLED, BROKEN = 9, 70
"""Exit codes of a process that was killed, and of one that failed with an exception that is not ours."""

Before = Callable[[str, Path], None]
"""Function that is called before an operation with its name and its path."""

_FUNCTIONS = ("mkdir", "rename", "replace", "unlink", "remove", "rmdir", "open", "fsync", "truncate")


def kill(operation: str, path: Path) -> None:
    """End the process as SIGKILL does: nothing is cleaned up, and buffers are lost."""
    os._exit(KILLED)


def fill_disk(operation: str, path: Path) -> None:
    """Refuse what needs room, as a full disk does."""
    if operation in ("mkdir", "open", "write", "fsync"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def strike_at(number: int, act: Before, lasting: bool = False) -> Before:
    """Return a function that acts before the operation of a number, from 0 on; if `lasting`, before all later ones."""
    count = -1

    def before(operation: str, path: Path) -> None:
        nonlocal count
        count += 1
        if count == number or (lasting and count > number):
            act(operation, path)

    return before


@contextmanager
def watched(folder: Path, before: Before) -> Iterator[None]:
    """Call a function before everything that changes files in a folder: open for writing, write, fsync, rename …"""
    root, opened = str(folder.resolve()), io.open

    def inside(path: Any, dir_fd: int | None = None) -> bool:
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        return dir_fd is not None or os.path.abspath(os.fspath(path)).startswith(root)

    def function(name: str) -> Callable[..., Any]:
        original = getattr(os, name)

        def call(path: Any, *args: Any, **kwargs: Any) -> Any:
            reads = name == "open" and not args[0] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if not reads and inside(path, kwargs.get("dir_fd")):
                before(name, Path(str(path)))
            return original(path, *args, **kwargs)

        return call

    def open_file(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if not set(mode) & set("wxa+") or isinstance(file, int) or not inside(file):
            return opened(file, mode, *args, **kwargs)
        before("open", Path(file))
        binary = opened(file, mode.replace("t", "").rstrip("b") + "b", 0)
        buffered = io.BufferedWriter(_Watched(binary, before))
        text = {key: kwargs[key] for key in ("encoding", "errors", "newline") if key in kwargs}
        return buffered if "b" in mode else io.TextIOWrapper(buffered, **text)

    functions = mock.patch.multiple(os, **{name: function(name) for name in _FUNCTIONS})
    with functions, mock.patch.object(io, "open", open_file), mock.patch.object(builtins, "open", open_file):
        yield


class _Watched(io.RawIOBase):
    """An open file that announces its first two writes; before the second one it is half-written."""

    def __init__(self, raw: Any, before: Before) -> None:
        self.raw, self.before, self.name, self.writes = raw, before, raw.name, 0

    def write(self, data: Any) -> int:
        self.writes += 1
        if self.writes < 3:
            self.before("write", Path(self.raw.name))
        return self.raw.write(data)

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self.raw.seekable()

    def seek(self, *args: int) -> int:
        return self.raw.seek(*args)

    def fileno(self) -> int:
        return self.raw.fileno()

    def close(self) -> None:
        self.raw.close()
        super().close()


def operations(folder: Path, work: Callable[[], object]) -> list[str]:
    """Do some work, and return the names of the file operations that it did in a folder."""
    names: list[str] = []
    with watched(folder, lambda operation, path: names.append(operation)):
        work()
    return names


def snapshots(folder: Path, work: Callable[[], object], copies: Path) -> list[Path]:
    """Do some work, and copy the folder before each operation in it: this is what a kill at that moment leaves behind.

    Copies that differ only in the random part of temporary names are made once.
    """
    states: dict[str, Path] = {}

    def copy(operation: str, path: Path) -> None:
        state = _state(folder)
        if state not in states:
            states[state] = copies / f"{len(states)}-before-{operation}-{path.name}"
            shutil.copytree(folder, states[state])

    with watched(folder, copy):
        work()
    return list(states.values())


def _state(folder: Path) -> str:
    files = {}
    for path in folder.rglob("*"):
        name = re.sub(r"\.[0-9a-f]{8}(?=/|$)", "", str(path.relative_to(folder)))
        files[name] = path.read_bytes() if path.is_file() else None
    return repr(sorted(files.items(), key=str))


def in_fork(work: Callable[[], object]) -> int:
    """Do some work in a copy of this process; return 0, `KILLED`, the exit code of one of our errors, or `BROKEN`."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = BROKEN
    try:
        work()
        code = 0
    except UnziploraError as error:
        code = error.exit_code
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def leftovers(folder: Path) -> list[Path]:
    """Return the half-written files and folders anywhere below a folder."""
    return [path for path in folder.rglob(".*") if path.name not in (".lock", ".lock.pid")]
