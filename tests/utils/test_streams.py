"""Streams whose readers go away: the work behind them goes on."""

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from unziplora import cli
from unziplora.utils.progress import Progress, show
from unziplora.utils.streams import SteadyStream, steady_output


class Broken(io.StringIO):
    """A stream that fails with an error of the system."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number, self.writes = number, 0

    def write(self, text: str) -> int:
        self.writes += 1
        raise OSError(self.number, os.strerror(self.number))


@pytest.mark.parametrize("number", [errno.EPIPE, errno.ENOSPC, errno.EIO])  # | head, /dev/full, a closed terminal
def test_first_failed_write_ends_the_writing_and_nothing_else(number: int) -> None:
    broken = Broken(number)
    stream = SteadyStream(broken)
    assert stream.write("text") == 4
    stream.write("text")
    stream.flush()
    assert broken.writes == 1
    assert isinstance(stream.error, OSError)
    assert stream.error.errno == number


@pytest.mark.parametrize("stream", [Broken(errno.EIO), io.StringIO()])
def test_progress_goes_on_without_its_reader(stream: io.StringIO) -> None:
    if not isinstance(stream, Broken):
        stream.close()
    with show(stream=stream) as view:
        view(Progress(1, 2, message="one"))
        view(Progress(2, 2, 0.5))


def test_program_without_streams_shows_no_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    with show() as view:
        view(Progress(1, 2, message="one"))


def test_closed_streams_are_replaced_for_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    with steady_output():
        print("out")
        print("err", file=sys.stderr)
    assert sys.stdout is None


def test_command_whose_result_nobody_can_read_fails_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdout", Broken(errno.ENOSPC))
    assert cli.main(["--version"]) == 1
    fault = "[Errno 28] No space left on device"
    assert capsys.readouterr().err == f"error: the result cannot be written to stdout ({fault})\n"


@pytest.mark.parametrize(
    ("redirection", "code"), [(">&-", 0), ("2>&-", 0), (">&- 2>&-", 0), ("2>/dev/full", 0), (">/dev/full", 1)]
)
def test_shell_redirections_are_no_faults(redirection: str, code: int, tmp_path: Path) -> None:
    command = f"exec {sys.executable} -m unziplora --version {redirection}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == code
    assert "fault" not in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
