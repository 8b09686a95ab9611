"""Views of runs that are read from their folders."""

import json
from pathlib import Path

import pytest
from fake_jobs import begin, recipe, train
from PIL import Image

from unziplora.errors import UserError
from unziplora.jobs.queue import Queue
from unziplora.jobs.state import RunSummary, find_runs, record_failure
from unziplora.studio import live, look

SCRIPT = "<script>alert(1)</script>"


def test_view_of_a_running_run_has_its_figures(tmp_path: Path) -> None:
    run = begin(tmp_path / "cat")
    for step, loss in ((1, 0.5), (2, 0.25)):
        run.log(step=step, loss=loss, seconds=3.0)
    (run.path / "worker.log").write_text("training\nstep 1/4  loss 0.5000  3.00 s/step  9 s left  1.5 GiB\n")
    html = live.view(RunSummary(run), "running")
    for part in ("2 / 4", "0.3750", "3.00 s", "<b>6 s</b>", "1.5 GiB", "<polyline", 'value="2" max="4"'):
        assert part in html


def test_steps_that_learn_words_count_in_the_progress(tmp_path: Path) -> None:
    run = begin(tmp_path / "cat")
    log = run.path / "worker.log"
    log.write_text("step 3/104  loss 1.0\n")
    assert live.progress_of(RunSummary(run)) == (3, 104)
    run.log(step=2, loss=0.5)
    assert live.progress_of(RunSummary(run)) == (102, 104)


def test_progress_of_several_seeds_counts_the_words_of_each_once_it_has_learned_them(tmp_path: Path) -> None:
    run = begin(tmp_path / "cat", seeds=3)
    log = run.path / "worker.log"
    for logged, count, done in (
        (0, 60, 60),
        (2, 102, 102),
        (4, 104, 104),
        (4, 150, 150),
        (5, 205, 205),
        (12, 312, 312),
    ):
        log.write_text(f"step {count}/312  loss 1.0\n")
        if logged:
            run.log(step=logged, loss=0.5)
        assert live.progress_of(RunSummary(run)) == (done, 312)
    log.write_text("step 101/312  loss 1.0\n")  # it is written less often than the steps
    assert live.progress_of(RunSummary(run)) == (312, 312)


def test_words_and_logs_are_escaped(tmp_path: Path) -> None:
    queue = Queue(tmp_path)
    job = queue.submit(recipe(tmp_path / "cat", content=SCRIPT))
    (job.run.path / "worker.log").write_text(SCRIPT)
    record_failure(job.run, UserError(SCRIPT))
    html = live.view(RunSummary(job.run), "failed")
    assert "<script" not in html
    assert html.count("&lt;script&gt;") == 3


def test_finished_run_shows_what_its_check_found(tmp_path: Path) -> None:
    run = begin(tmp_path / "cat")
    assert live.check(run) == ""
    run.check_file.write_text(json.dumps({"score": 0.7, "findings": ["came apart", f"carries {SCRIPT} along"]}))
    html = live.view(RunSummary(run), "finished")
    assert "<li>came apart</li>" in html
    assert "<script" not in html
    run.check_file.write_text("damaged")
    assert live.check(run) == ""


def test_failure_shows_thirty_lines_and_one_remedy(tmp_path: Path) -> None:
    run = begin(tmp_path / "cat")
    (run.path / "worker.log").write_text("".join(f"line {number}.\n" for number in range(100)))
    record_failure(run, UserError("the disk is full"))
    html = live.failure(run)
    assert "line 70." in html
    assert "line 69." not in html
    assert html.count("What to do:") == 1
    assert "Free some space" in html


@pytest.mark.parametrize("name", ["../cat", "/etc", "cat/../../cat", "", None, ".studio"])
def test_names_that_lead_elsewhere_name_no_run(tmp_path: Path, name: str | None) -> None:
    begin(tmp_path / "cat")
    begin(tmp_path / "runs" / "fox")
    assert live.run_in(tmp_path / "runs", name) is None


def test_run_is_found_by_its_name(tmp_path: Path) -> None:
    run = begin(tmp_path / "demo" / "cat")
    summary = live.run_in(tmp_path, "demo/cat")
    assert summary is not None
    assert summary.run.path == run.path


def name_of_current(runs: Path) -> str:
    summary = live.current(find_runs(runs))
    assert summary is not None
    return live.name_of(runs, summary)


def test_current_run_is_the_running_one_before_the_newest(tmp_path: Path) -> None:
    assert live.current(find_runs(tmp_path)) is None
    queue = Queue(tmp_path)
    queue.submit(recipe(tmp_path / "cat"))
    with queue.claimed():
        train(begin(tmp_path / "fox"), lambda _: None)
        assert name_of_current(tmp_path) == "cat"
    assert name_of_current(tmp_path) == "fox"


def test_sheets_are_named_after_their_steps(tmp_path: Path) -> None:
    run = begin(tmp_path / "cat")
    for step in (5, 10):
        Image.new("RGB", (8, 8)).save(run.sheet(step))
    assert [name for _, name in live.sheets(run)] == ["step 5", "step 10"]


def test_only_settings_that_differ_from_the_recipe_are_copied(tmp_path: Path) -> None:
    run = begin(tmp_path / "cat")
    method, keys = live.set_keys(RunSummary(run))
    assert method == "split"
    assert keys.keys() == {"images", "content", "style", "out", "base", "preset", "steps"}


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "just now"), (120, "2 min ago"), (7200, "2 h ago"), (2e5, "2 d ago")]
)
def test_age_is_in_the_largest_unit_that_fits(seconds: float, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live.time, "time", lambda: 1e9)
    assert live.age(1e9 - seconds) == text


def test_curve_of_many_values_has_at_most_200_points() -> None:
    svg = look.curve([float(number % 7) for number in range(5000)], "loss")
    assert svg.count(",") <= 203
    assert look.curve([1.0], "loss") == ""
