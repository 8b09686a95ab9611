"""Plans and refusals of commands, before anything is loaded."""

import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest

from unziplora.utils.inputs import read_toml

Call = Callable[..., tuple[int, str, str]]


def test_plan_of_a_prompt_with_several_lines_is_a_configuration(call: Call, tmp_path: Path) -> None:
    code, text, _ = call("sample", "--base", "bundled", "--prompts", "a cat\nin ink style", "--dry-run")
    assert code == 0
    (tmp_path / "plan.toml").write_text(text)
    assert read_toml(tmp_path / "plan.toml")["prompts"] == ["a cat\nin ink style"]


def test_more_steps_than_timesteps_are_refused(call: Call) -> None:
    code, _, error = call("sample", "--base", "bundled", "--prompts", "x", "--steps", 1001)
    assert code == 2
    assert "steps: Input should be less than or equal to 1000" in error


def test_studio_for_other_machines_needs_a_password_file_where_nobody_can_type(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gradio")
    monkeypatch.setattr(sys, "stdin", StringIO(""))
    code, _, error = call("studio", "--host", "0.0.0.0")
    assert code == 2
    assert "give --password-file" in error
