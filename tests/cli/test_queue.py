"""`queue`, `worker` and `runs` as commands, with a training that only writes files."""

import json
from pathlib import Path

import pytest
import torch
from fake_jobs import FakeTrainer
from safetensors.torch import save_file

from unziplora.cli import queue


@pytest.fixture(autouse=True)
def _fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "check", lambda config: config)
    monkeypatch.setattr(queue, "Trainer", FakeTrainer)


@pytest.fixture
def filled(call, tmp_path: Path):
    for animal in ("cat", "owl", "fox"):
        Path(tmp_path / f"{animal}.png").touch()
        code, out, _ = call("queue", "add", "split", f"{animal}.png", "--content", animal, "--style", "ink")
        assert code == 0
    assert out == "job 3  runs/fox  added\n"
    return call


def jobs(call) -> list[dict]:
    code, out, _ = call("queue", "list", "--json")
    assert code == 0
    return json.loads(out)["jobs"]


def test_added_command_line_becomes_a_run_folder_with_its_settings(filled, tmp_path: Path) -> None:
    assert [(job["job"], job["state"], job["content"]) for job in jobs(filled)] == [
        (1, "queued", "cat"),
        (2, "queued", "owl"),
        (3, "queued", "fox"),
    ]
    config = (tmp_path / "runs" / "cat" / "config.toml").read_text()
    assert f'images = [\n    "{tmp_path / "cat.png"}",\n]' in config


def test_other_trainings_and_unfinished_runs_are_added_too(call, tmp_path: Path) -> None:
    (tmp_path / "cat.png").touch()
    assert call("queue", "add", "train", "dreambooth", "cat.png", "--content", "cat", "--out", "runs/a")[0] == 0
    for name in "ab":
        save_file({"x": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    assert call("queue", "add", "--first", "zip", "a.safetensors", "b.safetensors", "--out", "runs/b")[0] == 0
    assert call("queue", "cancel", "a")[0] == 0
    assert [Path(job["run"]).name for job in jobs(call)] == ["b"]
    assert call("queue", "add", "train", "blora", "cat.png", "--out", "runs/c")[0] == 0
    (tmp_path / "runs" / "queue.sqlite").unlink()
    assert call("queue", "add", "--unfinished")[0] == 0
    assert {Path(job["run"]).name for job in jobs(call)} == {"b", "c"}


def test_folder_of_the_queue_is_that_of_its_runs(call, tmp_path: Path) -> None:
    (tmp_path / "cat.png").touch()
    words = ("split", "cat.png", "--content", "cat", "--style", "ink")
    code, out, _ = call("queue", "add", "--runs", "other", *words, "--json")
    assert code == 0
    (job,) = json.loads(out)["jobs"]
    assert Path(job["run"]) == tmp_path / "other" / "cat"
    assert call("queue", "add", "--runs", "other", *words, "--out", "runs/cat")[0] == 0
    assert (tmp_path / "runs" / "cat" / "config.toml").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to add"),
        (["split", "cat.png", "--content", "cat"], "style is missing"),
        (["split", "cat.png", "--content", "cat", "--style", "ink", "--dry-run"], "--dry-run does not go with a queue"),
        (["train"], "no training"),
        (["train", "nothing", "cat.png"], "no training"),
        (["split", "--stile", "ink"], "No such option"),
        (["nowhere"], "no run"),
    ],
)
def test_what_cannot_be_added_is_refused(call, tmp_path: Path, words: list[str], message: str) -> None:
    code, _, err = call("queue", "add", *words)
    assert code == 2
    assert message in err
    assert not (tmp_path / "runs").exists()


def test_worker_refuses_a_folder_that_does_not_exist(call, tmp_path: Path) -> None:
    code, _, err = call("worker", "--runs", "typo", "--until-empty")
    assert (code, "typo: no such folder" in err) == (2, True)
    assert not (tmp_path / "typo").exists()
    assert call("worker", "--until-empty")[0] == 0  # jobs may be added later to the folder that all commands take


def test_worker_does_the_jobs_and_reports_failures(filled, tmp_path: Path) -> None:
    code, out, _ = filled("worker", "--until-empty", "--quiet")
    assert code == 1
    assert out.splitlines() == [
        f"finished  {tmp_path / 'runs' / 'cat'}",
        f"finished  {tmp_path / 'runs' / 'fox'}",
        f"failed    {tmp_path / 'runs' / 'owl'}: owl.png: no such image",
    ]
    code, out, _ = filled("queue", "list")
    assert [line.split() for line in out.splitlines()] == [
        ["job", "state", "steps", "run", "words"],
        ["2", "failed", "0/600", "runs/owl", "owl,", "ink"],
    ]
    code, out, _ = filled("queue", "show", "owl")
    assert "error      owl.png: no such image" in out
    assert "The end of its log:\n  owl.png: no such image" in out
    assert "Try again: unziplora queue retry 2" in out
    assert filled("queue", "retry", "owl")[0] == 0
    assert jobs(filled)[0]["state"] == "queued"


def test_jobs_are_moved_paused_retried_and_canceled(filled, tmp_path: Path) -> None:
    assert filled("queue", "move", "fox")[0] == 0
    assert filled("queue", "move", "2", "--before", "1")[0] == 0
    assert [job["content"] for job in jobs(filled)] == ["fox", "owl", "cat"]
    assert filled("queue", "pause", "fox", "owl")[0] == 0
    assert "queued (pause)" in filled("queue", "list")[1]
    assert json.loads(filled("worker", "--until-empty", "--json")[1])["finished"] == [str(tmp_path / "runs" / "cat")]
    assert filled("queue", "retry", "fox")[0] == 0
    assert filled("queue", "cancel", "owl", "fox", "owl")[0] == 0
    assert filled("queue", "list")[1] == "The queue is empty.\n"
    code, _, err = filled("queue", "cancel", "owl")
    assert code == 2
    assert "owl: no such job" in err


def test_changes_of_several_jobs_happen_to_all_or_none(filled) -> None:
    assert filled("queue", "pause", "cat", "dog")[0] == 2
    assert all(not job["request"] for job in jobs(filled))


def test_a_run_in_the_queue_waits_in_the_list_of_runs_too(filled) -> None:
    filled("queue", "pause", "owl")
    states = {run["content"]: (run["state"], run["request"]) for run in json.loads(filled("runs", "--json")[1])["runs"]}
    assert states == {"cat": ("queued", ""), "owl": ("queued", "pause"), "fox": ("queued", "")}


def test_runs_are_listed_and_found_by_words(filled, tmp_path: Path) -> None:
    filled("worker", "--until-empty", "--quiet")
    code, out, _ = filled("runs", "fox", "--json")
    (run,) = json.loads(out)["runs"]
    assert (code, run["state"], run["content"], run["steps_done"]) == (0, "finished", "fox", 4)
    lines = filled("runs")[1].splitlines()
    assert len(lines) == 4
    assert lines[0].split() == ["state", "steps", "changed", "run", "words"]
    assert filled("runs", "whale")[1] == "no runs\n"
    assert filled("runs", "--runs", "elsewhere")[0] == 2


def test_damaged_queue_is_a_fault_of_the_machine_and_comes_back(filled, tmp_path: Path) -> None:
    (tmp_path / "runs" / "queue.sqlite").write_bytes(b"rubbish" * 1000)
    code, _, err = filled("queue", "list")
    assert code == 1
    assert "was moved to" in err
    assert "unziplora queue add --unfinished" in err
    assert filled("queue", "add", "--unfinished")[0] == 0
    assert len(jobs(filled)) == 3
