"""The studio's worker process: there is never a second one."""

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil

from unziplora.jobs.worker import workers
from unziplora.studio.workers import Workers


def mark(folder: Path, number: int, born: float = 0.0, host: str = socket.gethostname()) -> Path:
    file = folder / f".worker-{host}-{number}"
    file.write_text(str(born or psutil.Process(number).create_time()))
    return file


def test_mark_of_a_living_process_counts(tmp_path: Path) -> None:
    mark(tmp_path, os.getpid())
    assert workers(tmp_path) == [os.getpid()]


def test_mark_of_a_dead_process_is_removed(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    file = mark(tmp_path, process.pid, time.time())
    assert workers(tmp_path) == []
    assert not file.exists()


def test_number_of_a_dead_worker_that_another_process_has_now_does_not_count(tmp_path: Path) -> None:
    mark(tmp_path, os.getpid(), time.time() - 1e6)
    assert workers(tmp_path) == []


def test_marks_of_another_clock_and_of_another_machine_stay(tmp_path: Path) -> None:
    own = mark(tmp_path, os.getpid())
    os.utime(own, (time.time() - 1e6,) * 2)  # the drive's clock is behind
    other = mark(tmp_path, os.getpid(), time.time(), f"{socket.gethostname()}-2")
    assert workers(tmp_path) == [os.getpid()]
    assert other.exists()


def test_no_worker_is_started_where_one_works(tmp_path: Path) -> None:
    (tmp_path / ".studio").mkdir()
    mark(tmp_path, os.getpid())
    studio = Workers(tmp_path)
    studio.ensure()
    assert studio.process is None


def test_no_worker_is_started_if_none_is_wanted(tmp_path: Path) -> None:
    studio = Workers(tmp_path, allowed=False)
    studio.ensure()
    assert studio.process is None
    assert not studio.present()


def test_worker_is_started_once_and_stopped(tmp_path: Path) -> None:
    (tmp_path / ".studio").mkdir()
    studio = Workers(tmp_path)
    studio.ensure()
    assert studio.present()
    other = Workers(tmp_path)  # of a studio that was killed and started again
    thread = threading.Thread(target=other.ensure)
    thread.start()
    thread.join()
    assert other.process is None
    assert workers(tmp_path) == [studio.process.pid]
    studio.stop()
    assert workers(tmp_path) == []
    assert not studio.present()
