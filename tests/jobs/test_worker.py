"""Workers: one job after the other, failures, stops, requests, and random kills."""

import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest
from fake_jobs import in_child, recipe, steps_done, train, witnessed

from unziplora.errors import Interrupted, MachineError, UserError
from unziplora.jobs import worker
from unziplora.jobs.queue import Queue
from unziplora.jobs.state import read_failure, state_of
from unziplora.jobs.worker import work
from unziplora.runs.folder import RunFolder
from unziplora.utils.progress import Callback, Progress


@pytest.fixture
def queue(tmp_path: Path) -> Queue:
    queue = Queue(tmp_path / "runs")
    for name in "abc":
        queue.submit(recipe(queue.folder / name))
    return queue


def silent(event: Progress) -> None:
    return None


def test_jobs_are_done_one_after_the_other(queue: Queue) -> None:
    trained: list[str] = []
    events: list[Progress] = []

    def note(run: RunFolder, progress: Callback) -> None:
        trained.append(run.path.name)
        train(run, progress)

    result = work(queue, note, events.append, until_empty=True)
    assert trained == ["a", "b", "c"]
    assert [Path(path).name for path in result.finished] == ["a", "b", "c"]
    assert not result.failed
    assert not result.stopped
    assert queue.jobs() == []
    assert events[0].message == f"job 1, {queue.folder / 'a'}: started"
    assert "step 4/4" in (queue.folder / "a" / "worker.log").read_text()


def test_function_is_called_after_each_job_when_it_is_free(queue: Queue) -> None:
    seen: list[list[str]] = []
    work(queue, train, silent, until_empty=True, after=lambda: seen.append([job.run.path.name for job in queue.jobs()]))
    assert seen == [["b", "c"], ["c"], []]


def test_error_of_that_function_ends_the_work(queue: Queue) -> None:
    def broken() -> None:
        raise MachineError("the disk is full")

    with pytest.raises(MachineError, match="the disk is full"):
        work(queue, train, silent, until_empty=True, after=broken)
    assert [job.run.path.name for job in queue.jobs()] == ["b", "c"]


def test_failed_job_does_not_stop_the_worker(queue: Queue) -> None:
    def fail(run: RunFolder, progress: Callback) -> None:
        progress(Progress(0, 4, message="loading"))
        if run.path.name == "a":
            raise UserError("cat.jpg: no such image")
        if run.path.name == "b":
            raise RuntimeError("a bug")
        train(run, progress)

    result = work(queue, fail, silent, until_empty=True)
    assert [Path(path).name for path in result.finished] == ["c"]
    assert [(job.run.path.name, job.state) for job in queue.jobs()] == [("a", "failed"), ("b", "failed")]
    first, second = (read_failure(queue.job(name).run) for name in "ab")
    assert first is not None
    assert second is not None
    assert (first.message, first.log) == ("cat.jpg: no such image", ["loading", "cat.jpg: no such image"])
    assert second.message == "a bug"
    assert second.log[1] == "Traceback (most recent call last):"
    assert work(queue, train, silent, until_empty=True).finished == []
    queue.retry("a")
    assert [Path(path).name for path in work(queue, train, silent, until_empty=True).finished] == ["a"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_stopped_worker_leaves_a_job_that_goes_on(queue: Queue, number: signal.Signals) -> None:
    def stopped(run: RunFolder, progress: Callback) -> None:
        run.log(step=1)
        os.kill(os.getpid(), number)
        time.sleep(5)

    result = work(queue, stopped, silent)
    assert result.stopped
    assert [job.state for job in queue.jobs()] == ["interrupted", "queued", "queued"]
    work(queue, train, silent, until_empty=True)
    assert queue.jobs() == []
    assert steps_done(RunFolder(queue.folder / "a")) == 4


@pytest.mark.parametrize("request_", ["pause", "cancel"])
def test_request_to_a_running_job_stops_it_and_not_the_worker(
    queue: Queue, monkeypatch: pytest.MonkeyPatch, request_: str
) -> None:
    monkeypatch.setattr(worker, "BEAT", 0.01)

    def asked(run: RunFolder, progress: Callback) -> None:
        if run.path.name != "a":
            train(run, progress)
            return
        run.log(step=1)
        getattr(queue, request_)("a")
        try:
            for _ in range(500):
                time.sleep(0.01)
        except KeyboardInterrupt:
            raise Interrupted("stopped after step 1 of 4, checkpoint saved") from None

    result = work(queue, asked, silent, until_empty=True)
    assert not result.stopped
    assert [Path(path).name for path in result.finished] == ["b", "c"]
    assert [(job.state, job.request) for job in queue.jobs()] == (
        [("interrupted", "pause")] if request_ == "pause" else []
    )
    assert state_of(RunFolder(queue.folder / "a")) == "interrupted"


def test_waiting_worker_takes_jobs_that_come_later_and_stops(tmp_path: Path) -> None:
    queue = Queue(tmp_path / "runs")
    queue.folder.mkdir()

    def later() -> None:
        time.sleep(0.1)
        queue.submit(recipe(queue.folder / "late"))

    def last(run: RunFolder, progress: Callback) -> None:
        train(run, progress)
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()

    thread = threading.Thread(target=later)
    thread.start()
    events: list[Progress] = []
    result = work(queue, last, events.append, poll=0.01)
    thread.join()
    assert [Path(path).name for path in result.finished] == ["late"]
    waiting = f"waiting for jobs in {queue.folder}; Ctrl-C stops"
    assert [event.message for event in events if event.message][::3] == [waiting, waiting]
    assert result.stopped


def test_folder_deleted_under_its_job_is_no_fault(queue: Queue) -> None:
    import shutil

    def deleted(run: RunFolder, progress: Callback) -> None:
        if run.path.name == "a":
            shutil.rmtree(run.path)
            run.log(step=1)
        train(run, progress)

    with pytest.warns(UserWarning, match="job 1: its folder"):
        result = work(queue, deleted, silent, until_empty=True)
    assert [Path(path).name for path in result.finished] == ["b", "c"]
    assert not (queue.folder / "a").exists()


def test_worker_ends_if_it_cannot_record_a_failure(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise MachineError("the disk is full")

    monkeypatch.setattr(worker, "record_failure", full)
    with pytest.raises(MachineError, match="disk is full"):
        work(queue, full, silent)
    assert [job.state for job in queue.jobs()] == ["queued"] * 3


def test_worker_outside_the_main_thread_is_refused(queue: Queue) -> None:
    errors: list[Exception] = []

    def attempt() -> None:
        try:
            work(queue, train, silent)
        except UserError as error:
            errors.append(error)

    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    assert "needs the main thread" in str(errors)


def test_job_whose_process_is_killed_three_times_without_progress_fails(queue: Queue) -> None:
    def killed(run: RunFolder, progress: Callback) -> None:
        if run.path.name == "a" and (not run.log_file.exists() or steps_done(run) >= 2):
            os.kill(os.getpid(), signal.SIGKILL)
        train(run, progress)

    def step(run: RunFolder, progress: Callback) -> None:
        run.log(step=steps_done(run) + 1)
        os.kill(os.getpid(), signal.SIGKILL)

    for attempt in (killed, killed, step, step, killed, killed, killed):
        child = in_child(lambda attempt=attempt: work(queue, attempt, silent, until_empty=True))
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        assert queue.job("a").state == ("interrupted" if steps_done(queue.job("a").run) else "queued")
    assert [Path(path).name for path in work(queue, killed, silent, until_empty=True).finished] == ["b", "c"]
    failure = read_failure(queue.job("a").run)
    assert queue.job("a").state == "failed"
    assert failure is not None
    assert "killed 3 times without a step of progress" in failure.message
    queue.retry("a")
    assert queue.job("a").state == "interrupted"
    assert [Path(path).name for path in work(queue, train, silent, until_empty=True).finished] == ["a"]


def test_random_kills_lose_no_job_and_do_none_twice(tmp_path: Path) -> None:
    """Two workers at a time are killed at random moments, until every job is done."""
    queue, violations = Queue(tmp_path / "runs"), tmp_path / "violations"
    names = [f"job-{number:02d}" for number in range(20)]
    for name in names:
        queue.submit(recipe(queue.folder / name))
    slow = witnessed(violations, lambda run, progress: train(run, progress, seconds=0.02))
    draw = random.Random(0)

    def serve() -> None:
        work(queue, slow, silent, until_empty=True)

    kills = 0
    while queue.jobs() and kills < 200:
        children = [in_child(serve), in_child(serve)]
        time.sleep(draw.uniform(0.01, 0.3))
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        kills += 2
        for job in queue.jobs():
            if job.state == "failed":  # killed three times at one step
                queue.retry(job.number)
    assert not violations.exists(), violations.read_text()
    assert [state_of(RunFolder(queue.folder / name)) for name in names] == ["finished"] * len(names)
    assert all(steps_done(RunFolder(queue.folder / name)) == 4 for name in names)
    assert kills < 200
