"""The queue: order, requests, claims, and what may happen to its file and to the run folders."""

import errno
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from fake_jobs import begin, recipe, train
from safetensors.torch import save_file

from unziplora import api
from unziplora.config.zip import ZipConfig
from unziplora.errors import MachineError, UserError
from unziplora.jobs import queue as queues
from unziplora.jobs.batch import claim_row
from unziplora.jobs.claim import HEARTBEAT, Claim
from unziplora.jobs.queue import Queue, refuse_waiting
from unziplora.jobs.rows import Row
from unziplora.jobs.state import record_failure
from unziplora.methods.ziplora.inputs import complete
from unziplora.runs.folder import RunFolder


@pytest.fixture
def queue(tmp_path: Path) -> Queue:
    return Queue(tmp_path / "runs")


def submit(queue: Queue, *names: str, **changes: object) -> None:
    for name in names:
        queue.submit(recipe(queue.folder / name, **changes))


def order(queue: Queue) -> list[str]:
    return [job.run.path.name for job in queue.jobs()]


def claimed(queue: Queue) -> str | None:
    """The name of the job that a worker would take now."""
    with queue.claimed() as taken:
        return None if taken is None else taken[0].run.path.name


def test_submitted_job_is_a_run_folder_with_its_settings(queue: Queue) -> None:
    job = queue.submit(recipe(queue.folder / "cat", rank=8))
    assert job.state == "queued"
    assert job.run.config_file.is_file()
    assert "rank = 8" in job.run.config_file.read_text()
    assert [(one.number, one.run.path, one.request) for one in queue.jobs()] == [(1, queue.folder / "cat", "")]


def test_merge_is_submitted_with_what_it_takes_from_its_runs(queue: Queue, tmp_path: Path) -> None:
    for name in ("cat", "fox"):
        run = begin(tmp_path / name)
        for lora in ("content", "style"):
            save_file({"a": torch.zeros(1)}, run.lora(lora))
        run.card.write_text("done")
    loras = {"content_lora": tmp_path / "cat", "style_lora": tmp_path / "fox"}
    job = queue.submit(ZipConfig(**loras, out=queue.folder / "both"))
    config = job.run.config(ZipConfig)
    assert (config.base, config.content_prompt, config.style_prompt) == (
        "bundled",
        "a sks cat",
        "an image in ink style",
    )
    assert complete(config) == config  # so that its worker finds no other settings


def test_run_that_waits_is_not_begun_anew_by_others(queue: Queue, tmp_path: Path) -> None:
    submit(queue, "cat", style="ink")
    other = Queue(tmp_path)
    for begin_anew in (
        lambda: refuse_waiting(queue.folder / "cat"),
        lambda: other.submit(recipe(queue.folder / "cat", style="oil")),
        lambda: api.split(tmp_path / "cat.png", content="cat", style="oil", out=queue.folder / "cat", progress=False),
    ):
        with pytest.raises(UserError, match=r"cat: in the queue already; cancel that job first"):
            begin_anew()
    row = Row("line 1", recipe(queue.folder / "cat", style="oil"))
    assert "in the queue already" in claim_row(row).reason
    assert 'style = "ink"' in queue.jobs()[0].run.config_file.read_text()
    refuse_waiting(queue.folder / "fox")
    queue.cancel("cat")
    refuse_waiting(queue.folder / "cat")


def test_jobs_are_claimed_in_their_order_and_leave_when_they_are_finished(queue: Queue) -> None:
    submit(queue, "a", "b", "c")
    for name in "abc":
        with queue.claimed() as taken:
            assert taken is not None
            assert taken[0].run.path.name == name
            assert taken[0].state == "running"
            taken[0].run.card.write_text("done")
    assert queue.jobs() == []
    assert claimed(queue) is None


def test_claimed_job_is_not_claimed_twice_and_returns_when_it_is_not_finished(queue: Queue) -> None:
    submit(queue, "a", "b")
    with queue.claimed() as first, queue.claimed() as second, queue.claimed() as third:
        assert [taken and taken[0].run.path.name for taken in (first, second, third)] == ["a", "b", None]
    assert [job.state for job in queue.jobs()] == ["queued", "queued"]
    assert claimed(queue) == "a"


def test_job_is_claimable_again_when_its_worker_is_killed_before_it_starts(queue: Queue) -> None:
    submit(queue, "a")
    code = f"""
import time
from unziplora.jobs.queue import Queue
with Queue({str(queue.folder)!r}).claimed() as taken:
    print(taken[0].number, flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "1\n"
        assert queue.job(1).state == "running"
        with queue.claimed() as taken:
            assert taken is None
        worker.kill()
        worker.wait()
    assert queue.job(1).state == "queued"
    assert claimed(queue) == "a"


@pytest.mark.parametrize(
    ("moved", "before", "expected"), [("c", None, "cabd"), ("d", "b", "adbc"), ("a", "d", "bcad"), ("b", "b", "abcd")]
)
def test_job_is_moved_before_another_or_to_the_front(
    queue: Queue, moved: str, before: str | None, expected: str
) -> None:
    submit(queue, *"abcd")
    queue.move(moved, before)
    assert order(queue) == list(expected)


def test_order_stays_right_after_many_moves_into_one_gap(queue: Queue) -> None:
    submit(queue, *"abc")
    for number in range(60):
        queue.move("bc"[number % 2], "cb"[number % 2])
    assert order(queue) == ["a", "c", "b"]


def test_first_jobs_keep_their_own_order(queue: Queue) -> None:
    submit(queue, *"abc")
    for name in "ab":
        queue.cancel(name)
        begin(queue.folder / name)
    queue.add(queue.folder / "a", queue.folder / "b", first=True)
    assert order(queue) == ["a", "b", "c"]


def test_paused_job_waits_until_it_is_retried(queue: Queue) -> None:
    submit(queue, "a", "b")
    queue.pause("a")
    assert claimed(queue) == "b"
    queue.retry("a")
    assert claimed(queue) == "a"


def test_failed_job_keeps_its_place_until_it_is_retried(queue: Queue) -> None:
    submit(queue, "a", "b")
    record_failure(queue.job("a").run, UserError("no such image"))
    assert [job.state for job in queue.jobs()] == ["failed", "queued"]
    assert claimed(queue) == "b"
    assert queue.retry("a").state == "queued"


def test_canceled_job_takes_its_folder_along_only_if_nothing_was_learned(queue: Queue) -> None:
    submit(queue, "new", "begun")
    queue.job("begun").run.log(step=1)
    queue.cancel("new")
    queue.cancel("begun")
    assert queue.jobs() == []
    assert not (queue.folder / "new").exists()
    assert (queue.folder / "begun").is_dir()


def test_canceled_job_keeps_pictures_that_may_be_the_only_copies(queue: Queue) -> None:
    submit(queue, "a")
    (queue.folder / "a" / "images").mkdir()
    queue.cancel("a")
    assert (queue.folder / "a" / "images").is_dir()


def test_lost_job_is_no_request(queue: Queue) -> None:
    submit(queue, "a")
    with queue.claimed() as taken:
        assert taken is not None
        queue.file.unlink()
        assert queue.request(taken[0]) == ""


def test_paused_job_that_was_finished_elsewhere_leaves_the_queue(queue: Queue) -> None:
    submit(queue, "a")
    queue.pause("a")
    train(queue.job("a").run, lambda _: None)
    with queue.claimed() as taken:
        assert taken is None
    assert queue.jobs() == []


def test_folder_that_may_not_be_written_does_not_stop_the_queue(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    submit(queue, "a", "b")
    acquire = Claim.acquire

    def refused(claim: Claim) -> bool:
        if claim.run.path.name == "a":
            raise MachineError("a: no permission to write here")
        return acquire(claim)

    monkeypatch.setattr(Claim, "acquire", refused)
    claimed = queue.claimed()
    claimed = queue.claimed()
    with pytest.warns(UserWarning, match="job 1 is left out: a: no permission"):
        taken = claimed.__enter__()
    claimed.__exit__(None, None, None)
    assert taken is not None
    assert taken[0].name == "b"
    assert len(queue.jobs()) == 2


def test_folder_that_may_not_be_read_is_listed(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    submit(queue, "a")

    def refused(path: Path) -> list[str]:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "listdir", refused)
    assert [job.state for job in queue.jobs()] == ["failed"]
    with queue.claimed() as taken:
        assert taken is None


def test_running_job_is_canceled_by_its_worker(queue: Queue) -> None:
    submit(queue, "a")
    with queue.claimed() as taken:
        assert taken is not None
        queue.cancel("a")
        assert queue.request(taken[0]) == "cancel"
        assert queue.job("a").state == "running"
        assert taken[0].run.path.is_dir()
    assert queue.jobs() == []


def test_cancellation_survives_the_worker_that_should_have_heard_it(queue: Queue) -> None:
    submit(queue, "a", "b")
    claim = Claim(queue.job("a").run)
    assert claim.acquire()
    queue.cancel("a")
    claim.release()  # as the system does for a process that is killed
    assert claimed(queue) == "b"
    assert order(queue) == ["b"]


def test_run_is_in_the_queue_once(queue: Queue) -> None:
    submit(queue, "a")
    with pytest.raises(UserError, match="in the queue already; cancel that job first"):
        queue.submit(recipe(queue.folder / "a", rank=4))
    with pytest.raises(UserError, match="in the queue already"):
        queue.add(queue.folder / "a")
    assert "rank = 4" not in queue.job("a").run.config_file.read_text()


def test_taken_folder_leaves_no_job(queue: Queue) -> None:
    (queue.folder / "thesis").mkdir(parents=True)
    (queue.folder / "thesis" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="not empty"):
        queue.submit(recipe(queue.folder / "thesis"))
    assert queue.jobs() == []


def test_only_unfinished_runs_are_added(queue: Queue) -> None:
    run = begin(queue.folder / "cat")
    with pytest.raises(UserError, match="no run"):
        queue.add(queue.folder / "dog")
    run.card.write_text("done")
    with pytest.raises(UserError, match="finished already"):
        queue.add(run.path)


def test_unknown_and_ambiguous_names_are_refused(queue: Queue) -> None:
    submit(queue, "one/cat", "two/cat", "100%")
    assert queue.job("100%").number == 3
    with pytest.raises(UserError, match="several jobs have this name"):
        queue.job("cat")
    with pytest.raises(UserError, match="no such job"):
        queue.job("%")
    with pytest.raises(UserError, match="no such job"):
        queue.job(2**63)
    assert queue.job("one/cat") == queue.job(1) == queue.job(queue.folder / "one" / "cat")


def test_job_of_a_deleted_folder_leaves_the_queue_with_a_warning(queue: Queue) -> None:
    submit(queue, "a", "b")
    shutil.rmtree(queue.folder / "a")
    assert queue.job("a").state == "missing"
    with pytest.warns(UserWarning, match="job 1: its folder .*a is gone"):
        assert claimed(queue) == "b"
    assert not (queue.folder / "a").exists()
    assert order(queue) == ["b"]


def test_whole_runs_folder_may_be_moved(queue: Queue, tmp_path: Path) -> None:
    submit(queue, "a")
    queue.folder.rename(tmp_path / "elsewhere")
    assert [job.state for job in Queue(tmp_path / "elsewhere").jobs()] == ["queued"]


def damage(file: Path, how: str) -> None:
    data = bytearray(file.read_bytes())
    if how == "text":
        data[:] = b"these are my notes" * 100
    elif how == "cut":
        del data[len(data) // 2 :]
    else:
        data[100:4096] = os.urandom(3996)
    file.write_bytes(data)


@pytest.mark.parametrize("how", ["text", "cut", "page"])
def test_damaged_file_is_moved_aside_and_the_runs_come_back(queue: Queue, how: str) -> None:
    submit(queue, "a", "b")
    damage(queue.file, how)
    damaged = queue.file.read_bytes()
    with pytest.raises(MachineError, match=r"damaged .* moved to .*queue-damaged-.* --unfinished"):
        queue.jobs()
    (aside,) = queue.folder.glob("queue-damaged-*.sqlite")
    assert aside.read_bytes() == damaged
    assert queue.jobs() == []
    assert [job.run.path.name for job in queue.add_unfinished()] == ["a", "b"]
    assert queue.add_unfinished() == []


def test_emptied_file_is_noticed(queue: Queue) -> None:
    submit(queue, "a")
    queue.file.write_bytes(b"")
    with pytest.warns(UserWarning, match="is empty.*--unfinished"):
        assert queue.jobs() == []


def test_missing_folder_has_no_queue_and_is_not_created(queue: Queue) -> None:
    with pytest.raises(UserError, match="no queue here"):
        queue.jobs()
    assert not queue.folder.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("database or disk is full", "the disk is full"),
        ("database is locked", "another process has been changing the queue"),
        ("attempt to write a readonly database", "no permission to write here"),
    ],
)
def test_faults_of_the_machine_are_named(
    queue: Queue, monkeypatch: pytest.MonkeyPatch, text: str, message: str
) -> None:
    submit(queue, "a")

    def refuse(*_: object) -> None:
        raise sqlite3.OperationalError(text)

    monkeypatch.setattr(queue, "_insert", refuse)
    with pytest.raises(MachineError, match=message):
        submit(queue, "b")
    assert order(queue) == ["a"]


def test_drive_without_locks_is_used_by_lock_files_and_heartbeats(
    queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    def refuse(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    connect = sqlite3.connect

    def only_dotfile(address: str, *args: object, **options: object) -> sqlite3.Connection:
        if "vfs=unix-dotfile" not in address:
            raise sqlite3.OperationalError("disk I/O error")
        return connect(address, *args, **options)

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(fcntl, "lockf", refuse)
    monkeypatch.setattr(queues.sqlite3, "connect", only_dotfile)
    RunFolder(queue.folder / "a").checkpoints.mkdir(parents=True)
    (queue.folder / "a" / "config.toml").write_text("")
    queue.add(queue.folder / "a")
    with queue.claimed() as first, queue.claimed() as second:
        assert first is not None
        assert second is None
        claim = first[1]
        assert first[0].state == "running"
        os.utime(claim.owner, (time.time() - HEARTBEAT - 1,) * 2)  # its machine has gone
        assert first[0].state == "queued"
        claim.beat()
        assert first[0].state == "running"
    lock = queue.file.with_name("queue.sqlite.lock")
    lock.mkdir()  # of a process that was killed in the middle of a change
    os.utime(lock, (time.time() - HEARTBEAT - 1,) * 2)
    assert [job.state for job in queue.jobs()] == ["queued"]


def test_ten_thousand_jobs_are_listed_and_claimed_at_once(queue: Queue) -> None:
    submit(queue, "first")
    with sqlite3.connect(queue.file) as db:
        rows = [(f"run-{number}", number + 2) for number in range(10_000)]
        db.executemany("INSERT INTO jobs (run, place) VALUES (?, ?)", rows)
    times = []  # of the processor, so that other work on this machine does not count
    for _ in range(5):
        start = time.process_time()
        assert len(queue.jobs()) == 10_001
        listed = time.process_time()
        with queue.claimed() as taken:
            times.append((listed - start, time.process_time() - listed))
            assert taken is not None
    assert min(time for time, _ in times) < 0.05
    assert min(time for _, time in times) < 0.05


def test_process_killed_in_a_change_leaves_the_queue_as_it_was(queue: Queue) -> None:
    submit(queue, "a")
    child = os.fork()
    if not child:
        with queue._changing() as db:
            db.execute("DELETE FROM jobs")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert order(queue) == ["a"]
