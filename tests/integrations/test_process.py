"""The process of a split: progress, result, failures, and a stop that lets the run save."""

import os
import sys
import time

import pytest

from unziplora.errors import MachineError, UserError

pytestmark = pytest.mark.skipif(os.name == "nt", reason="the stand-in for the command is a script with a first line")


@pytest.fixture
def script(tmp_path, monkeypatch):
    """Let the command line be a script of some Python lines."""

    def write(body):
        path = tmp_path / "python"
        path.write_text(f"#!{sys.executable}\nimport json, os, signal, sys, time\n{body}\n")
        path.chmod(0o755)
        monkeypatch.setenv("UNZIPLORA_PYTHON", str(path))

    return write


def run(nodes, arguments=("split",), check=lambda: None):
    steps = []
    result = nodes.process.run(arguments, lambda *step: steps.append(step), check)
    return result, steps


def test_arguments_progress_and_result_pass(nodes, script):
    script(
        "for step in (10, 20): print(f'step {step}/20  loss 0.1', file=sys.stderr, flush=True)\n"
        "print(json.dumps({'run': sys.argv[1:], 'offline': os.environ['HF_HUB_OFFLINE']}))"
    )
    result, steps = run(nodes, ["split", "a b.png"])
    assert result == {"run": ["-m", "unziplora", "split", "a b.png", "--json"], "offline": "1"}
    assert steps == [(10, 20), (20, 20)]


def test_refused_settings_are_the_users_error(nodes, script):
    script("print(json.dumps({'error': 'cat.png: no such image', 'exit_code': 2})); sys.exit(2)")
    with pytest.raises(UserError, match=r"^cat\.png: no such image$"):
        run(nodes)


def test_failed_run_shows_its_last_lines(nodes, script):
    script(
        "[print('line', n, file=sys.stderr) for n in range(99)]; print(json.dumps({'error': 'no memory'})); sys.exit(1)"
    )
    with pytest.raises(MachineError, match=r"exit code 1\): no memory\nIts last lines:\nline 69\n(.*\n)*line 98$"):
        run(nodes)


def test_result_that_is_no_json_is_a_failure(nodes, script):
    script("print('hello')")
    with pytest.raises(MachineError, match=r"exit code 0\): it gave no result\nIts last lines:\n\(none\)"):
        run(nodes)


def test_stop_lets_the_run_save(nodes, script, tmp_path):
    saved = tmp_path / "saved"
    script(
        f"def save(*_): open({str(saved)!r}, 'w').close(); sys.exit(130)\n"
        "signal.signal(signal.SIGTERM, save)\nprint('step 1/9', file=sys.stderr, flush=True)\ntime.sleep(60)"
    )
    began = time.monotonic()

    class StoppedError(Exception):
        pass

    def check():
        if steps:
            raise StoppedError

    steps = []
    with pytest.raises(StoppedError):
        nodes.process.run(["split"], lambda *step: steps.append(step), check)
    assert saved.exists()
    assert time.monotonic() - began < 30


def test_missing_python_is_named(nodes, monkeypatch):
    monkeypatch.setenv("UNZIPLORA_PYTHON", "/nowhere/python")
    with pytest.raises(UserError, match="UNZIPLORA_PYTHON is /nowhere/python, which is not a file: set it"):
        run(nodes)


def test_own_python_is_the_default(nodes, monkeypatch):
    monkeypatch.delenv("UNZIPLORA_PYTHON", raising=False)
    assert nodes.process.command(["split"]) == [sys.executable, "-m", "unziplora", "split"]
