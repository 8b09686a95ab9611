"""Actions of the page on runs: start, continue, extend, duplicate, rename, trash."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomli_w
from PIL import Image

from unziplora.config.recipe import resolve, to_toml
from unziplora.errors import UserError
from unziplora.jobs.claim import Claim, is_worked_on
from unziplora.jobs.queue import Job, Queue
from unziplora.jobs.state import clear_failure, state_of
from unziplora.jobs.trainings import TRAININGS, check, training_of
from unziplora.runs.folder import IMAGES, RunFolder, with_absolute_paths
from unziplora.studio import libraries
from unziplora.utils.files import absolute, atomic_write, copy_file, explained, free_folder, safe_name, write_png
from unziplora.utils.inputs import read_toml

TRASH = ".trash"
"""Folder in the runs folder that removed runs are moved into."""


def start(
    runs: Path,
    method: str,
    keys: dict[str, Any],
    name: str,
    images: Sequence[Image.Image] = (),
    mask: Image.Image | None = None,
) -> Job:
    """Create a run in a new folder, with its images in it, and append it to the queue.

    Args:
        method: a key of `TRAININGS`.
        name: for the folder; a number is appended if it is taken.
        mask: of the first image.

    Raises:
        UserError: the settings or an image cannot be used; no folder is left.
        MachineError: disk full, no permission.
    """
    libraries.load()
    run = RunFolder(free_folder(runs / safe_name(name, "run", longest=60)))
    pictures = [*images, *([mask] if mask else [])]
    with run.stored(dict(enumerate(pictures, 1))) as files:
        paths = [absolute(files[number]) for number in range(1, len(images) + 1)]
        stored: dict[str, Any] = {"images": paths} if paths else {}
        if mask is not None:
            stored["masks"] = [absolute(files[len(pictures)])]
        config = resolve(TRAININGS[method].recipe, keys, stored, {"out": run.path})
        return Queue(runs).submit(check(config))


def change(
    runs: Path, run: RunFolder, keys: dict[str, Any], image: Image.Image, mask: Image.Image | None = None
) -> Job:
    """Give a waiting split other settings and another picture before it begins; it keeps its name and its place.

    Raises:
        UserError: it has begun or does not wait any more, or the settings or the picture cannot be used.
        MachineError: disk full, no permission.
    """
    libraries.load()
    job, claim = waiting(runs, run), Claim(run)
    fault = UserError(f"{run.path.name}: this run has begun or is gone; start a new one from its settings")
    if job is None or not claim.acquire():
        raise fault
    try:
        if run.log_file.exists():
            raise fault
        _rewrite(run, keys, [image, *([mask] if mask else [])])
        clear_failure(run)
    finally:
        claim.release()
    return job


def _rewrite(run: RunFolder, keys: dict[str, Any], pictures: Sequence[Image.Image]) -> None:
    """Replace the settings and the pictures of a run that has not begun; all are as they were if one is refused."""
    before = [file for file in (run.path / IMAGES).glob("*.png") if file.stem.isdecimal()]
    first = 1 + max((int(file.stem) for file in before), default=0)
    files = [run.path / IMAGES / f"{first + number}.png" for number in range(len(pictures))]
    try:
        for file, picture in zip(files, pictures, strict=True):
            write_png(file, picture)
        stored = {"images": files[:1], "masks": files[1:], "out": run.path}
        config = resolve(TRAININGS["split"].recipe, keys, {name: value for name, value in stored.items() if value})
        atomic_write(run.config_file, to_toml(with_absolute_paths(check(config))))
    except BaseException:
        for file in files:
            file.unlink(missing_ok=True)
        raise
    for file in before:
        file.unlink(missing_ok=True)


def go_on(runs: Path, run: RunFolder) -> Job:
    """Let an unfinished run train on, as a new job or as the one that waits or failed.

    Raises:
        UserError: it is finished.
    """
    queue = Queue(runs)
    clear_failure(run)
    return queue.retry(job.number) if (job := waiting(runs, run)) else queue.add(run.path)[0]


def extend(runs: Path, run: RunFolder, steps: int) -> Job:
    """Let a finished run train on by so many steps; its LoRAs are kept as those of an earlier step.

    Raises:
        UserError: it is not finished, or has no checkpoint.
    """
    if steps < 1:
        raise UserError("the number of more steps must be 1 or more")
    model = training_of(read_toml(run.config_file)).recipe
    settings = run.settings_to_extend(model, steps)
    if not run.steps():
        raise UserError(f"{run.path.name}: no checkpoint to extend this run from; start a new one from its settings")
    for name, file in run.loras.items():
        copy_file(file, run.kept_lora(name, settings["steps"] - steps))
    run.reopen(resolve(model, settings))
    return Queue(runs).add(run.path)[0]


def duplicate(runs: Path, run: RunFolder) -> Job:
    """Append a run with the settings and the images of another one to the queue."""
    copy = RunFolder(free_folder(run.path))
    settings = _moved(read_toml(run.config_file), run.path, copy.path)
    try:
        for file in sorted((run.path / IMAGES).glob("*")):
            copy_file(file, copy.path / IMAGES / file.name)
        return Queue(runs).submit(resolve(training_of(settings).recipe, settings, {"out": copy.path}))
    except BaseException:
        if not copy.config_file.exists():
            shutil.rmtree(copy.path, ignore_errors=True)
        raise


def rename(runs: Path, run: RunFolder, name: str) -> RunFolder:
    """Rename the folder of a run; paths in its configuration that lead into the folder are changed with it.

    Raises:
        UserError: the name is taken or empty, or the run is being worked on or waits in the queue.
    """
    new = run.path.with_name(safe_name(name, "", longest=60) or run.path.name)
    if new == run.path:
        raise UserError("give a new name of letters and digits")
    if new.exists():
        raise UserError(f"{new.name}: there is such a folder already; choose another name")
    if is_worked_on(run) or waiting(runs, run):
        raise UserError(f"{run.path.name}: wait until this run is finished, or cancel it first")
    settings = _moved(read_toml(run.config_file), run.path, new)
    _move(run.path, new)
    atomic_write(new / "config.toml", tomli_w.dumps(settings))
    return RunFolder(new)


def trash(runs: Path, run: RunFolder) -> Path:
    """Move a run into the trash; a waiting job is canceled.

    Raises:
        UserError: the run is being worked on.
    """
    job = waiting(runs, run)
    if job:
        Queue(runs).pause(job.number)  # so that no worker takes it meanwhile
    if is_worked_on(run):
        if job and not job.request:
            Queue(runs).retry(job.number)
        raise UserError(f"{run.path.name}: this run is being worked on; cancel it first")
    target = free_folder(runs / TRASH / run.path.relative_to(runs))
    _move(run.path, target)
    if job:
        Queue(runs).cancel(job.number)  # after the folder has gone, which it would remove if nothing was learned
    return target


def restore(runs: Path, run: RunFolder) -> RunFolder:
    """Move a run out of the trash to where it was, with a number if that name is taken."""
    target = free_folder(runs / run.path.relative_to(runs / TRASH))
    settings = _moved(read_toml(run.config_file), runs / run.path.relative_to(runs / TRASH), target)
    _move(run.path, target)
    atomic_write(target / "config.toml", tomli_w.dumps(settings))
    return RunFolder(target)


def jobs(runs: Path) -> dict[Path, Job]:
    """Return the jobs of the queue in their order, by the absolute paths of their runs."""
    queue = Queue(runs)
    return {absolute(job.run.path): job for job in queue.jobs()} if queue.file.is_file() else {}


def waiting(runs: Path, run: RunFolder) -> Job | None:
    """Return the job of a run; None if it is not in the queue."""
    return jobs(runs).get(absolute(run.path))


def state(run: RunFolder, job: Job | None) -> str:
    """Return the state of a run, with what the queue asks of it.

    Args:
        job: of the run; None if it is not in the queue.
    """
    now = state_of(run, queued=job is not None)
    request = job.request if job is not None else ""
    if now != "running":  # a process that was asked to cancel and then killed has left the run as it is
        return "paused" if request == "pause" and now in ("queued", "interrupted") else now
    return {"pause": "pausing", "cancel": "canceling"}.get(request, now)


def _move(source: Path, target: Path) -> None:
    with explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        source.rename(target)


def _moved(settings: dict[str, Any], old: Path, new: Path) -> dict[str, Any]:
    """Return settings in which the paths inside one folder lead into another."""
    before, after = absolute(old), absolute(new)

    def moved(value: Any) -> Any:
        if isinstance(value, list):
            return [moved(item) for item in value]
        if isinstance(value, str) and Path(value).is_absolute() and Path(value).is_relative_to(before):
            return str(after / Path(value).relative_to(before))
        return value

    return {name: moved(value) for name, value in settings.items()}
