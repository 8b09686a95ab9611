"""What the page does to runs, on runs that no one trains."""

import errno
import shutil
from pathlib import Path
from typing import Any

import pytest
from fake_jobs import begin, recipe, train
from PIL import Image

from unziplora.errors import MachineError, UserError
from unziplora.jobs.queue import Queue
from unziplora.jobs.state import find_runs, record_failure
from unziplora.runs.folder import RunFolder
from unziplora.studio import actions
from unziplora.utils.inputs import read_toml

WORDS = {"content": "rocket", "style": "linocut", "base": "bundled"}


def finished(path: Path) -> RunFolder:
    run = begin(path)
    train(run, lambda _: None)
    return run


def state(runs: Path, run: RunFolder) -> str:
    return actions.state(run, actions.waiting(runs, run))


def image() -> Image.Image:
    return Image.linear_gradient("L").convert("RGB").resize((128, 128))


def test_start_stores_picture_and_mask_in_a_run_that_waits(tmp_path: Path) -> None:
    mask = Image.new("L", (128, 128), 255)
    job = actions.start(tmp_path, "split", WORDS, "a rocket", [image()], mask)
    settings = read_toml(job.run.config_file)
    assert (job.name, job.state) == ("a-rocket", "queued")
    assert settings["images"] == [str(tmp_path / "a-rocket" / "images" / "1.png")]
    assert settings["masks"] == [str(tmp_path / "a-rocket" / "images" / "2.png")]
    assert Image.open(settings["images"][0]).tobytes() == image().tobytes()


def test_second_run_of_a_name_gets_a_number(tmp_path: Path) -> None:
    names = [actions.start(tmp_path, "split", WORDS, "rocket", [image()]).name for _ in range(2)]
    assert names == ["rocket", "rocket-2"]


@pytest.mark.parametrize("keys", [{"rank": "0"}, {"content": ""}, {"resolution": "1000"}])
def test_faulty_settings_leave_nothing(tmp_path: Path, keys: dict[str, str]) -> None:
    with pytest.raises(UserError):
        actions.start(tmp_path / "runs", "split", {**WORDS, **keys}, "rocket", [image()])
    assert find_runs(tmp_path / "runs") == []
    assert not (tmp_path / "runs" / "rocket").exists()


@pytest.mark.parametrize("name", ["../../evil", "/etc/evil", "..", "a\0b", "<script>", "con: aux", "ü" * 300])
def test_odd_names_stay_in_the_runs_folder(tmp_path: Path, name: str) -> None:
    job = actions.start(tmp_path / "runs", "split", WORDS, name, [image()])
    assert job.run.path.parent == tmp_path / "runs"
    assert not job.run.path.name.startswith(".")


def test_failed_run_goes_on_as_the_job_that_it_was(tmp_path: Path) -> None:
    queue = Queue(tmp_path)
    job = queue.submit(recipe(tmp_path / "cat"))
    record_failure(job.run, UserError("no"))
    assert state(tmp_path, job.run) == "failed"
    assert actions.go_on(tmp_path, job.run).number == job.number
    assert state(tmp_path, job.run) == "queued"


def test_interrupted_run_goes_on_as_a_new_job(tmp_path: Path) -> None:
    run = begin(tmp_path / "cat")
    run.log(step=1)
    assert state(tmp_path, run) == "interrupted"
    actions.go_on(tmp_path, run)
    assert [job.name for job in Queue(tmp_path).jobs()] == ["cat"]


def test_paused_job_is_called_so(tmp_path: Path) -> None:
    job = Queue(tmp_path).submit(recipe(tmp_path / "cat"))
    Queue(tmp_path).pause(job.number)
    assert state(tmp_path, job.run) == "paused"
    record_failure(job.run, UserError("too dark"))
    assert state(tmp_path, job.run) == "failed"


def test_extended_run_waits_with_more_steps_and_keeps_its_loras(tmp_path: Path) -> None:
    run = finished(tmp_path / "cat")
    run.content.write_bytes(b"content after 4 steps")
    run.checkpoint(4, b"checkpoint")
    actions.extend(tmp_path, run, 6)
    assert read_toml(run.config_file)["steps"] == 10
    assert run.kept_lora("content", 4).read_bytes() == b"content after 4 steps"
    assert state(tmp_path, run) in ("queued", "interrupted")
    assert actions.waiting(tmp_path, run)


@pytest.mark.parametrize("steps", [0, -3])
def test_run_is_extended_by_at_least_a_step(tmp_path: Path, steps: int) -> None:
    with pytest.raises(UserError, match="1 or more"):
        actions.extend(tmp_path, finished(tmp_path / "cat"), steps)


def test_duplicate_has_images_of_its_own(tmp_path: Path) -> None:
    job = actions.start(tmp_path, "split", WORDS, "rocket", [image()])
    copy = actions.duplicate(tmp_path, job.run)
    assert copy.name == "rocket-2"
    assert read_toml(copy.run.config_file)["images"] == [str(tmp_path / "rocket-2" / "images" / "1.png")]
    assert (tmp_path / "rocket-2" / "images" / "1.png").is_file()


@pytest.mark.parametrize("act", [actions.duplicate, lambda runs, run: actions.extend(runs, run, 5)])
def test_full_disk_leaves_no_half_of_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, act: Any) -> None:
    job = actions.start(tmp_path, "split", WORDS, "rocket", [image()])
    train(job.run, lambda _: None)
    (job.run.checkpoints / "step-000004.safetensors").touch()
    (job.run.path / "rocket-style.safetensors").touch()
    before = {path for path in tmp_path.rglob("*") if path.is_file()}

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(MachineError, match="the disk is full"):
        act(tmp_path, job.run)
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == before


def test_renamed_run_finds_its_images(tmp_path: Path) -> None:
    job = actions.start(tmp_path, "split", WORDS, "rocket", [image()])
    with pytest.raises(UserError, match="cancel it first"):
        actions.rename(tmp_path, job.run, "moon")
    train(job.run, lambda _: None)
    with Queue(tmp_path).claimed():
        pass  # a finished job leaves the queue
    run = actions.rename(tmp_path, job.run, "moon rocket")
    assert run.path == tmp_path / "moon-rocket"
    assert read_toml(run.config_file)["images"] == [str(tmp_path / "moon-rocket" / "images" / "1.png")]


@pytest.mark.parametrize("name", ["", "..", "///", "cat"])
def test_run_is_not_renamed_to_nothing_or_itself(tmp_path: Path, name: str) -> None:
    run = finished(tmp_path / "cat")
    with pytest.raises(UserError):
        actions.rename(tmp_path, run, name)
    assert run.path.is_dir()


def test_trashed_run_comes_back_where_it_was(tmp_path: Path) -> None:
    run = finished(tmp_path / "demo" / "cat")
    target = actions.trash(tmp_path, run)
    assert target == tmp_path / ".trash" / "demo" / "cat"
    assert find_runs(tmp_path) == []
    finished(tmp_path / "demo" / "cat")
    back = actions.restore(tmp_path, RunFolder(target))
    assert back.path == tmp_path / "demo" / "cat-2"
    assert back.card.exists()


def test_run_whose_process_was_killed_while_it_was_canceled_can_go_on(tmp_path: Path) -> None:
    queue = Queue(tmp_path)
    job = queue.submit(recipe(tmp_path / "cat"))
    with queue.claimed():
        job.run.log(step=1)
        queue.cancel(job.number)
        assert state(tmp_path, job.run) == "canceling"
        killed = queue.jobs()[0]
        assert killed.request == "cancel"
        (job.run.path / ".claim.json").unlink()
        assert state(tmp_path, job.run) == "interrupted"
        assert actions.go_on(tmp_path, job.run).request == ""


def test_waiting_run_in_the_trash_leaves_the_queue_and_comes_back_with_its_pictures(tmp_path: Path) -> None:
    job = actions.start(tmp_path, "split", WORDS, "rocket", [image()], Image.new("L", (128, 128), 255))
    settings = read_toml(job.run.config_file)
    target = actions.trash(tmp_path, job.run)
    assert Queue(tmp_path).jobs() == []
    assert find_runs(tmp_path) == []
    back = actions.restore(tmp_path, RunFolder(target))
    assert read_toml(back.config_file) == settings
    assert Image.open(settings["images"][0]).tobytes() == image().tobytes()
    assert Path(settings["masks"][0]).is_file()
    assert actions.go_on(tmp_path, back).state == "queued"


def test_run_in_work_is_neither_renamed_nor_trashed(tmp_path: Path) -> None:
    job = Queue(tmp_path).submit(recipe(tmp_path / "cat"))
    with Queue(tmp_path).claimed():
        for action in (lambda: actions.trash(tmp_path, job.run), lambda: actions.rename(tmp_path, job.run, "fox")):
            with pytest.raises(UserError):
                action()
    assert job.run.path.is_dir()
    assert [one.request for one in Queue(tmp_path).jobs()] == [""]


def test_waiting_run_gets_other_settings_and_another_picture(tmp_path: Path) -> None:
    job = actions.start(tmp_path, "split", WORDS, "rocket", [image()], Image.new("L", (128, 128), 255))
    actions.change(tmp_path, job.run, {**WORDS, "style": "ink", "steps": 7}, image().rotate(90))
    settings = read_toml(job.run.config_file)
    assert (settings["style"], settings["steps"], settings["masks"]) == ("ink", 7, [])
    assert Image.open(settings["images"][0]).tobytes() == image().rotate(90).tobytes()
    assert [file.name for file in (job.run.path / "images").iterdir()] == ["3.png"]
    assert (Queue(tmp_path).jobs()[0].number, state(tmp_path, job.run)) == (job.number, "queued")


def test_changed_run_is_tried_again_after_a_failure(tmp_path: Path) -> None:
    job = actions.start(tmp_path, "split", WORDS, "rocket", [image()])
    record_failure(job.run, UserError("too dark"))
    actions.change(tmp_path, job.run, WORDS, image())
    assert state(tmp_path, job.run) == "queued"


def test_refused_change_leaves_the_waiting_run_as_it_was(tmp_path: Path) -> None:
    job = actions.start(tmp_path, "split", WORDS, "rocket", [image()])
    before = job.run.config_file.read_bytes()
    with pytest.raises(UserError):
        actions.change(tmp_path, job.run, {**WORDS, "rank": 0}, image())
    assert job.run.config_file.read_bytes() == before
    assert [file.name for file in (job.run.path / "images").iterdir()] == ["1.png"]


def test_run_that_has_begun_is_not_changed(tmp_path: Path) -> None:
    job = actions.start(tmp_path, "split", WORDS, "rocket", [image()])
    with Queue(tmp_path).claimed(), pytest.raises(UserError, match="has begun"):
        actions.change(tmp_path, job.run, WORDS, image())
    job.run.log(step=1)
    with pytest.raises(UserError, match="has begun"):
        actions.change(tmp_path, job.run, WORDS, image())


def test_run_begins_with_the_settings_that_the_check_has_completed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A merge takes its prompts from the runs that it builds on; without them the worker would refuse to resume it."""
    monkeypatch.setattr(actions, "check", lambda config: config.model_copy(update={"full_prompt": "a sks rocket"}))
    job = actions.start(tmp_path, "split", WORDS, "rocket", [image()])
    assert read_toml(job.run.config_file)["full_prompt"] == "a sks rocket"
