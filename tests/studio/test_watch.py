"""The view of one run, as the page asks for it."""

from pathlib import Path

import pytest
from fake_jobs import begin

gradio = pytest.importorskip("gradio")

from unziplora.studio.watch import watch  # noqa: E402
from unziplora.studio.workers import Workers  # noqa: E402


def test_refresh_leaves_the_choice_of_the_page_alone(tmp_path: Path) -> None:
    """An answer that was asked for before another run was chosen would bring the first one back."""
    run = begin(tmp_path / "cat")
    begin(tmp_path / "fox")
    with gradio.Blocks():
        view = watch(tmp_path, Workers(tmp_path, allowed=False), "now")
    choice, seen, *_ = view.choose("cat")
    assert choice["value"] == "cat"
    run.log(step=1, loss=0.5)
    choice, *_ = view.refresh("cat", seen)
    assert choice["choices"]
    assert "value" not in choice


def test_run_that_is_gone_is_replaced_by_another_one(tmp_path: Path) -> None:
    begin(tmp_path / "fox")
    with gradio.Blocks():
        view = watch(tmp_path, Workers(tmp_path, allowed=False), "now")
    choice, *_ = view.refresh("cat", [["cat"], ["cat", "fox"], 0])
    assert choice["value"] == "fox"
