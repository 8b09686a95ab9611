"""How commands are run in tests: in this process, in an empty folder."""

from collections.abc import Callable
from pathlib import Path

import pytest

from unziplora import cli

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """Run a command in an empty folder: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("UNZIPLORA_DEBUG", raising=False)

    def run(*args: object) -> tuple[int, str, str]:
        code = cli.main([str(arg) for arg in args])
        return (code, *capsys.readouterr())

    return run
