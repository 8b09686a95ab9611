"""States, computed from what processes leave in a run folder."""

import errno
import os
import time
from pathlib import Path

import pytest
from fake_jobs import begin, in_child, recipe, train

from unziplora.errors import UserError
from unziplora.jobs.state import RunSummary, clear_failure, find_runs, read_failure, record_failure, state_of
from unziplora.runs.folder import RunFolder


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return begin(tmp_path / "cat")


def test_run_waits_in_a_queue_until_its_first_step(run: RunFolder) -> None:
    assert state_of(run, queued=True) == "queued"
    assert state_of(run) == "interrupted"
    run.log(step=1)
    assert state_of(run, queued=True) == "interrupted"


def test_run_is_running_while_any_process_trains_it_and_interrupted_when_that_is_killed(run: RunFolder) -> None:
    def hold() -> None:
        with run.lock():
            run.log(step=1)
            time.sleep(60)

    child = in_child(hold)
    while not run.log_file.exists():
        time.sleep(0.01)
    assert state_of(run) == "running"
    os.kill(child, 9)
    os.waitpid(child, 0)
    assert state_of(run, queued=True) == "interrupted"


def test_looking_at_a_run_does_not_keep_a_process_from_starting_it(run: RunFolder) -> None:
    def look() -> None:
        (run.path / ".lock.pid").touch()
        while True:
            state_of(run)

    child = in_child(look)
    for _ in range(100):
        with run.lock():
            pass
    os.kill(child, 9)
    os.waitpid(child, 0)


def test_finished_run_has_its_card(run: RunFolder) -> None:
    train(run, lambda _: None)
    assert state_of(run) == "finished"


def test_finished_run_that_is_trained_on_is_running(run: RunFolder) -> None:
    train(run, lambda _: None)
    with run.lock():
        assert state_of(run) == "running"
    assert state_of(run) == "finished"


def test_failed_run_keeps_its_reason_and_the_end_of_its_log(run: RunFolder) -> None:
    (run.path / "worker.log").write_text("".join(f"line {number}\n" for number in range(50)))
    record_failure(run, UserError("cat.jpg: no such image"))
    failure = read_failure(run)
    assert state_of(run) == "failed"
    assert failure is not None
    assert failure.message == "cat.jpg: no such image"
    assert failure.log == [f"line {number}" for number in range(20, 50)]
    clear_failure(run)
    assert state_of(run) == "interrupted"
    assert read_failure(run) is None


def test_error_of_an_earlier_process_does_not_count(run: RunFolder) -> None:
    record_failure(run, UserError("out of memory"))
    past = time.time() - 5
    os.utime(run.path / ".error.json", (past, past))
    run.log(step=1)
    assert state_of(run) == "interrupted"


def test_damaged_error_is_still_an_error(run: RunFolder) -> None:
    (run.path / ".error.json").write_text("{")
    failure = read_failure(run)
    assert state_of(run) == "failed"
    assert failure is not None
    assert failure.message == "its error cannot be read"


def test_deleted_run_is_missing(run: RunFolder) -> None:
    assert state_of(RunFolder(run.path / "no such folder")) == "missing"
    assert state_of(RunFolder(run.config_file)) == "missing"


def test_deleted_folder_does_not_come_back_with_an_error(tmp_path: Path) -> None:
    record_failure(RunFolder(tmp_path / "gone"), UserError("gone"))
    assert not (tmp_path / "gone").exists()


def test_finished_run_has_no_error_any_more(run: RunFolder) -> None:
    record_failure(run, UserError("out of memory"))
    train(run, lambda _: None)
    about = RunSummary(run).as_dict()
    assert (about["state"], "error" in about) == ("finished", False)


def test_settings_of_any_type_are_searched(tmp_path: Path) -> None:
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.toml").write_text("images = 3\n")
    assert len(find_runs(tmp_path, ["odd"])) == 1


def test_runs_are_found_again_by_words(tmp_path: Path) -> None:
    for name, words in {"a": {"content": "cat"}, "deep/b": {"style": "oil painting"}, "c": {"content": "fox"}}.items():
        with RunFolder.created(tmp_path / name, recipe(tmp_path / name, **words)):
            pass
    (tmp_path / "no run").mkdir()
    assert {one.run.path.name for one in find_runs(tmp_path)} == {"a", "b", "c"}
    assert [one.run.path.name for one in find_runs(tmp_path, ["OIL", "cat"])] == ["b"]
    assert [one.run.path.name for one in find_runs(tmp_path, ["fox"])] == ["c"]
    assert len(find_runs(tmp_path, ["cat.jpg"])) == 3
    assert find_runs(tmp_path / "missing") == []


def test_a_folder_that_may_not_be_read_does_not_hide_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "ab":
        with RunFolder.created(tmp_path / name, recipe(tmp_path / name)):
            pass
    listdir = os.listdir

    def refuse(path: Path) -> list[str]:
        if Path(path).name == "a":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return listdir(path)

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.warns(UserWarning, match="a: no permission to read this folder; it is left out"):
        assert [one.run.path.name for one in find_runs(tmp_path)] == ["b"]


def test_summary_contains_state_words_steps_and_time(run: RunFolder) -> None:
    run.log(step=3, loss=0.5)
    (summary,) = find_runs(run.path.parent)
    figures = summary.as_dict()
    assert abs(figures.pop("changed") - time.time()) < 60
    assert figures == {
        "run": str(run.path),
        "state": "interrupted",
        "content": "cat",
        "style": "ink",
        "steps_done": 3,
        "steps": 4,
    }


@pytest.mark.parametrize(("method", "steps"), [("zip", 4), ("direct", 0), ("null-space", 0)])
def test_merge_that_trains_nothing_has_no_steps(run: RunFolder, method: str, steps: int) -> None:
    run.config_file.write_text(f'method = "{method}"\nsteps = 4\n')
    (summary,) = find_runs(run.path.parent)
    assert summary.steps == steps


def test_run_with_a_damaged_configuration_is_listed_without_words(run: RunFolder) -> None:
    run.config_file.write_text("rank = [")
    (summary,) = find_runs(run.path.parent)
    assert summary.words == {}
    assert summary.as_dict()["state"] == "interrupted"
