"""Batches: skipped, resumed and failed runs, the report, and the contact sheet."""

import os
import signal
from pathlib import Path

import pytest
from fake_jobs import begin, recipe, steps_done, train
from PIL import Image

from unziplora.errors import Interrupted, UserError
from unziplora.jobs.batch import contact_sheet, in_this_process, run_batch
from unziplora.jobs.claim import Claim
from unziplora.jobs.rows import Row
from unziplora.jobs.state import state_of
from unziplora.runs.folder import RunFolder
from unziplora.utils.files import write_png
from unziplora.utils.progress import Callback, Progress


def rows(folder: Path, *names: str) -> list[Row]:
    return [Row(f"line {number}", recipe(folder / name)) for number, name in enumerate(names, 2)]


def silent(event: Progress) -> None:
    return None


def test_finished_runs_are_skipped_and_others_go_on_from_their_step(tmp_path: Path) -> None:
    train(begin(tmp_path / "done"), silent)
    begun = begin(tmp_path / "begun")
    begun.log(step=1)
    begun.checkpoint(1, lambda file: file.write(b"state"))
    results = run_batch(rows(tmp_path, "done", "begun", "new"), tmp_path, in_this_process(train), silent)
    assert [result.outcome for result in results] == ["skipped", "finished", "finished"]
    assert all(steps_done(result.run) == 4 for result in results)


def test_failures_are_listed_with_their_reasons_and_tried_again_by_the_next_batch(tmp_path: Path) -> None:
    def fail(run: RunFolder, progress: Callback) -> None:
        if run.path.name == "bad":
            raise UserError("bad.png: damaged")
        train(run, progress)
        write_png(run.samples / "samples.png", Image.new("RGB", (64, 32), "red"))

    batch = rows(tmp_path, "good", "bad", "last")
    results = run_batch(batch, tmp_path, in_this_process(fail), silent)
    assert [(result.outcome, result.reason) for result in results] == [
        ("finished", ""),
        ("failed", "bad.png: damaged"),
        ("finished", ""),
    ]
    report = (tmp_path / "report.md").read_text()
    assert "2 finished, 1 failed\n" in report
    assert "| good | cat, ink | finished |" in report
    assert "## bad failed\n\nbad.png: damaged" in report
    assert "![Contact sheet](contact-sheet.png)" in report
    assert (tmp_path / "contact-sheet.png").is_file()
    again = run_batch(batch, tmp_path, in_this_process(train), silent)
    assert [result.outcome for result in again] == ["skipped", "finished", "skipped"]


def test_run_of_another_process_is_left_alone(tmp_path: Path) -> None:
    claim = Claim(begin(tmp_path / "taken"))
    assert claim.acquire()
    results = run_batch(rows(tmp_path, "taken", "free"), tmp_path, in_this_process(train), silent)
    assert state_of(claim.run) == "running"
    claim.release()
    assert [(result.outcome, result.reason) for result in results] == [
        ("failed", "another process is working on it"),
        ("finished", ""),
    ]


def test_folder_that_was_taken_meanwhile_fails_alone(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("years of work")
    results = run_batch(rows(tmp_path, "taken", "free"), tmp_path, in_this_process(train), silent)
    assert [result.outcome for result in results] == ["failed", "finished"]
    assert os.listdir(tmp_path / "taken") == ["thesis.txt"]


def test_interrupted_batch_reports_and_continues(tmp_path: Path) -> None:
    def stop(run: RunFolder, progress: Callback) -> None:
        if run.path.name == "b":
            run.log(step=1)
            run.checkpoint(1, lambda file: file.write(b"state"))
            os.kill(os.getpid(), signal.SIGTERM)
        train(run, progress)

    batch = rows(tmp_path, "a", "b", "c")
    with pytest.raises(Interrupted, match="stopped after 1 of 3 runs; the same command continues"):
        run_batch(batch, tmp_path, in_this_process(stop), silent)
    assert "1 finished, 2 not finished" in (tmp_path / "report.md").read_text()
    assert [result.outcome for result in run_batch(batch, tmp_path, in_this_process(train), silent)] == [
        "skipped",
        "finished",
        "finished",
    ]


def test_contact_sheet_of_a_thousand_runs_is_no_larger_than_viewers_open(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "one.png")
    runs = [(f"a-run-with-a-long-name-{number}", tmp_path / "one.png") for number in range(1000)]
    assert max(contact_sheet(runs).size) <= 16_000


def test_contact_sheet_is_a_square_of_labeled_cells(tmp_path: Path) -> None:
    for number in range(5):
        Image.new("RGB", (800, 400), (50 * number, 0, 0)).save(tmp_path / f"{number}.png")
    sheet = contact_sheet([(f"run {number}", tmp_path / f"{number}.png") for number in range(5)])
    assert 3 * 640 < sheet.width < 3.2 * 640
    assert 2 * 320 < sheet.height < 2 * 420
    assert sheet.getpixel((640 + 320, 200))[0] == 50
