"""A queue of runs: one SQLite file in the runs folder, which contains their order and requests, and nothing else."""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import time
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import NamedTuple
from urllib.parse import quote

from filelock import FileLock

from unziplora.config.training import TrainingConfig
from unziplora.errors import MachineError, UserError
from unziplora.jobs.claim import HEARTBEAT, Claim
from unziplora.jobs.state import State, clear_failure, find_runs, is_open, state_of
from unziplora.jobs.trainings import completed
from unziplora.runs.folder import IMAGES, RunFolder
from unziplora.utils.files import UNSUPPORTED, absolute, explained

FILE = "queue.sqlite"
"""Name of the file of a queue in its folder."""

PATIENCE = 30.0
"""Seconds to wait for another process that is changing the queue."""

_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS jobs (number INTEGER PRIMARY KEY AUTOINCREMENT, run TEXT NOT NULL UNIQUE, "
    "place REAL NOT NULL, request TEXT NOT NULL DEFAULT '')",
    "CREATE INDEX IF NOT EXISTS by_place ON jobs (place)",
)
_REMEDY = "No run is lost: put the unfinished ones back with `unziplora queue add --unfinished`"
_ROWS = "SELECT number, run, request, ? AS folder FROM jobs"


class Job(NamedTuple):
    """A run in a queue.

    Attributes:
        number: never given to another job of the queue.
        name: the run folder, relative to the folder of the queue, or absolute if it lies elsewhere.
        request: "pause", "cancel" or nothing.
        folder: folder of the queue.
    """

    number: int
    name: str
    request: str
    folder: str

    @property
    def run(self) -> RunFolder:
        return RunFolder(Path(self.folder, self.name))

    @property
    def state(self) -> State:
        """Present state, computed from the run folder."""
        return state_of(self.run, queued=True)


class Queue:
    """A queue of runs, shared by all processes that open the same folder.

    Every method raises a MachineError if the file is damaged (it is moved aside), cannot be written, or is blocked.
    """

    def __init__(self, folder: str | os.PathLike[str] = "runs") -> None:
        self.folder = absolute(Path(folder).expanduser())
        self.file = self.folder / FILE

    def submit(self, config: TrainingConfig, first: bool = False) -> Job:
        """Create the run folder of a new job with its completed recipe, and append the job or put it first.

        Raises:
            UserError: the folder is taken, or in a queue already, or a run that the recipe builds on is not usable.
        """
        config = completed(config)
        refuse_waiting(config.out)
        with self._changing() as db:
            number = self._insert(db, config.out, first)
            with RunFolder.created(config.out, config):
                return self._job(number, config.out)

    def add(self, *runs: str | os.PathLike[str], first: bool = False) -> list[Job]:
        """Append unfinished runs, or put them first.

        Raises:
            UserError: one of them is not an unfinished run, or in the queue already.
        """
        folders = [RunFolder(absolute(Path(run).expanduser())) for run in runs]
        for run in folders:
            if not run.unfinished:
                fault = "finished already" if run.card.exists() else "no run (it has no config.toml and checkpoints)"
                raise UserError(f"{run.path}: {fault}; only unfinished runs can wait in a queue")
        with self._changing() as db:
            ordered = folders[::-1] if first else folders
            jobs = [self._job(self._insert(db, run.path, first), run.path) for run in ordered]
        return jobs[::-1] if first else jobs

    def add_unfinished(self) -> list[Job]:
        """Append all unfinished runs of the folder, the oldest first: the way back from a lost queue."""
        waiting = {job.run.path for job in self.jobs()}
        runs = [summary.run for summary in reversed(find_runs(self.folder)) if summary.run.unfinished]
        return self.add(*(path for run in runs if (path := absolute(run.path)) not in waiting))

    def jobs(self, limit: int = -1) -> list[Job]:
        """Return the jobs in their order; their states are computed when they are asked for."""
        with self._opened() as db:
            return list(map(Job._make, db.execute(f"{_ROWS} ORDER BY place LIMIT ?", [str(self.folder), limit])))

    def contains(self, run: Path) -> bool:
        """Return True if a run is a job of the queue."""
        with self._opened() as db:
            return db.execute("SELECT 1 FROM jobs WHERE run = ?", [self._key(run)]).fetchone() is not None

    def count(self) -> int:
        """Return the number of jobs."""
        with self._opened() as db:
            return int(db.execute("SELECT count(*) FROM jobs").fetchone()[0])

    def job(self, name: str | int) -> Job:
        """Find a job by its number, its run folder, or the name of that folder.

        Raises:
            UserError: there is none, or several have this name.
        """
        text = str(name)
        conditions: list[tuple[str, list[str | int]]] = [
            ("number = ?", [int(text) if text.isdecimal() and len(text) < 19 else -1]),
            ("run IN (?, ?)", [self._key(Path(text)), self._key(self.folder / text)]),
            ("run LIKE ? ESCAPE '!'", ["%/" + re.sub(r"([!%_])", r"!\1", text)]),
        ]
        with self._opened() as db:
            for condition, values in conditions:
                jobs = [*map(Job._make, db.execute(f"{_ROWS} WHERE {condition}", [str(self.folder), *values]))]
                if jobs:
                    break
        if len(jobs) != 1:
            fault = "several jobs have this name" if jobs else "no such job"
            raise UserError(f"{name}: {fault}; give a number of `unziplora queue list`")
        return jobs[0]

    def move(self, name: str | int, before: str | int | None = None) -> Job:
        """Move a job before another one, or to the front."""
        job = self.job(name)
        other = None if before is None else self.job(before)
        if other == job:
            return job
        with self._changing() as db:
            for _ in range(2):
                above, below = self._neighbors(db, other)
                place = (above + below) / 2
                if above < place < below:
                    break
                # no number is left between the two: the places become whole again
                order = "SELECT number AS other, row_number() OVER (ORDER BY place) AS place FROM jobs"
                db.execute(f"UPDATE jobs SET place = (SELECT place FROM ({order}) WHERE other = number)")
            db.execute("UPDATE jobs SET place = ? WHERE number = ?", [place, job.number])
        return job

    def pause(self, name: str | int) -> Job:
        """Let a job wait until it is retried; if it is running, its worker saves its step and takes another."""
        return self._ask(self.job(name), "pause")

    def retry(self, name: str | int) -> Job:
        """Let a failed or paused job run again."""
        job = self._ask(self.job(name), "")
        if job.state == "failed":
            clear_failure(job.run)
        return job

    def cancel(self, name: str | int) -> Job:
        """Take a job out of the queue; if it is running, its worker saves its step first.

        The folder of a run that has begun stays; a folder that contains nothing but settings goes.
        """
        job = self.job(name)
        claim = Claim(job.run)
        with self._changing() as db:
            try:
                if job.run.path.is_dir() and not claim.acquire():
                    db.execute("UPDATE jobs SET request = 'cancel' WHERE number = ?", [job.number])
                    return job._replace(request="cancel")
                db.execute("DELETE FROM jobs WHERE number = ?", [job.number])
                begun = job.run.log_file.exists() or (job.run.path / IMAGES).exists()  # pictures may be the only copies
                if claim.held and not begun and job.run.is_free():
                    shutil.rmtree(job.run.path, ignore_errors=True)
            finally:
                claim.release()
        return job

    def request(self, job: Job) -> str:
        """Return the present request to a job; none if the queue has lost it, because `cancel` leaves one."""
        with self._opened() as db:
            row = db.execute("SELECT request FROM jobs WHERE number = ?", [job.number]).fetchone()
        return str(row[0]) if row else ""

    @contextmanager
    def claimed(self) -> Iterator[tuple[Job, Claim] | None]:
        """Claim the first job that nobody works on, while the context is open; None if there is none.

        Afterwards the job leaves the queue if it is finished or canceled.
        """
        with self._changing() as db:
            taken = self._claim(db)
        try:
            yield taken
        finally:
            if taken is not None:
                job, claim = taken
                claim.release()
                with self._changing() as db:
                    if job.state == "finished":
                        db.execute("DELETE FROM jobs WHERE number = ?", [job.number])
                    else:
                        db.execute("DELETE FROM jobs WHERE number = ? AND request = 'cancel'", [job.number])

    def _claim(self, db: sqlite3.Connection) -> tuple[Job, Claim] | None:
        gone, taken = [], None
        for job in map(Job._make, db.execute(f"{_ROWS} ORDER BY place", [str(self.folder)])):
            state = job.state
            if state == "missing":
                warnings.warn(f"job {job.number}: its folder {job.run.path} is gone; so is the job", stacklevel=4)
            if state in ("missing", "finished") or (job.request == "cancel" and state != "running"):
                gone.append([job.number])
            elif state in ("queued", "interrupted") and not job.request and (claim := _begin(job)):
                taken = job, claim
                break
        db.executemany("DELETE FROM jobs WHERE number = ?", gone)
        return taken

    def _ask(self, job: Job, request: str) -> Job:
        with self._changing() as db:
            db.execute("UPDATE jobs SET request = ? WHERE number = ?", [request, job.number])
        return job._replace(request=request)

    def _insert(self, db: sqlite3.Connection, path: Path, first: bool) -> int:
        try:
            number = db.execute("INSERT INTO jobs (run, place) VALUES (?, 0)", [self._key(path)]).lastrowid
        except sqlite3.IntegrityError:
            raise _in_queue(path) from None
        edge = "min(place) - 1" if first else "max(place) + 1"
        db.execute(f"UPDATE jobs SET place = (SELECT {edge} FROM jobs) WHERE number = ?", [number])
        clear_failure(RunFolder(path))
        return int(number or 0)

    def _neighbors(self, db: sqlite3.Connection, job: Job | None) -> tuple[float, float]:
        """Return the places between which a job comes that is moved before another, or to the front."""
        if job is None:
            first = db.execute("SELECT min(place) FROM jobs").fetchone()[0] or 0.0
            return first - 2, first
        (below,) = db.execute("SELECT place FROM jobs WHERE number = ?", [job.number]).fetchone() or (0.0,)
        above = db.execute("SELECT max(place) FROM jobs WHERE place < ?", [below]).fetchone()[0]
        return below - 2 if above is None else above, below

    def _key(self, path: Path) -> str:
        """Return the name of a run folder in the queue, which stays right if the whole runs folder is moved."""
        path = absolute(path.expanduser())
        return path.relative_to(self.folder).as_posix() if path.is_relative_to(self.folder) else str(path)

    def _job(self, number: int, path: Path) -> Job:
        return Job(number, self._key(path), "", str(self.folder))

    @contextmanager
    def _changing(self) -> Iterator[sqlite3.Connection]:
        """Open the queue for a change that takes place completely or not at all."""
        with explained(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        with self._opened() as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
            except BaseException:
                with suppress(sqlite3.Error):
                    db.execute("ROLLBACK")
                raise
            db.execute("COMMIT")

    @contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        if not self.folder.is_dir():
            raise UserError(f"{self.folder}: no queue here; add a job with `unziplora queue add`")
        try:
            with closing(self._connect()) as db:
                yield db
        except sqlite3.DatabaseError as error:
            raise self._explain(error) from error

    def _connect(self) -> sqlite3.Connection:
        """Open the file, on drives without locks by a VFS that locks by files of its own."""
        was_empty = self.file.is_file() and not self.file.stat().st_size
        try:
            db = self._open("")
        except sqlite3.OperationalError:
            if os.name == "nt" or _has_locks(self.folder):
                raise
            _remove_stale(self.file.with_name(f"{self.file.name}.lock"))
            db = self._open("unix-dotfile")
        if was_empty:
            warnings.warn(f"{self.file} is empty. {_REMEDY}", stacklevel=6)
        return db

    def _open(self, vfs: str) -> sqlite3.Connection:
        place = quote(self.file.as_posix())  # not `as_uri`: SQLite refuses the server of a share as authority
        root = "" if place.startswith("/") else "/"
        address = f"file://{root}{place}?mode=rwc" + (f"&vfs={vfs}" if vfs else "")
        db = sqlite3.connect(address, PATIENCE, isolation_level=None, uri=True)
        try:
            with suppress(sqlite3.OperationalError):  # readers and writers take turns where it is impossible
                db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = NORMAL")
            if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'by_place'").fetchone():
                for statement in _SCHEMA:
                    db.execute(statement)
        except BaseException:
            db.close()
            raise
        return db

    def _explain(self, error: sqlite3.DatabaseError) -> MachineError:
        """Return the message for a fault of the file; a damaged one is moved aside."""
        text = str(error)
        if type(error) is sqlite3.DatabaseError:  # not a database, or malformed
            return MachineError(f"{self.file} is damaged ({text}) and was moved to {self._set_aside()}. {_REMEDY}")
        if "full" in text:
            return MachineError(f"{self.file}: the disk is full; free some space")
        if "locked" in text:
            return MachineError(f"{self.file}: another process has been changing the queue for {PATIENCE:.0f} s")
        if "readonly" in text or "unable to open" in text:
            return MachineError(f"{self.file}: no permission to write here; choose another folder")
        return MachineError(f"{self.file}: {text}")

    def _set_aside(self) -> Path:
        """Move a damaged file with its journal; two processes that notice the damage at once move it once."""
        aside = self.file.with_name(f"queue-damaged-{time.strftime('%Y%m%d-%H%M%S')}.sqlite")
        with FileLock(self.folder / ".queue.lock"):
            try:
                with closing(self._open("")) as db:
                    sound = db.execute("PRAGMA quick_check").fetchone() == ("ok",)
            except sqlite3.DatabaseError:
                sound = False
            if not sound:
                for end in ("", "-wal", "-shm", "-journal"):
                    with suppress(FileNotFoundError):
                        self.file.with_name(self.file.name + end).replace(aside.with_name(aside.name + end))
        return aside


def _begin(job: Job) -> Claim | None:
    """Claim a job; None if another process works on it or has ended it, or if its folder does not allow that."""
    claim = Claim(job.run)
    try:
        if claim.acquire() and is_open(job.run):
            return claim
    except (MachineError, OSError) as error:
        warnings.warn(f"job {job.number} is left out: {error}", stacklevel=6)
    claim.release()
    return None


def _has_locks(folder: Path) -> bool:
    """Return True if the drive of a folder has the locks that SQLite uses."""
    import fcntl

    with NamedTemporaryFile(dir=folder, prefix=".locks-") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno not in UNSUPPORTED
    return True


def _remove_stale(lock: Path) -> None:
    """Remove the lock of a process that was killed: a change takes milliseconds."""
    with suppress(OSError):
        if time.time() - lock.stat().st_mtime > HEARTBEAT:
            lock.rmdir() if lock.is_dir() else lock.unlink()


def refuse_waiting(run: Path) -> None:
    """Refuse to begin a run in the folder of one that waits in a queue, whose settings would be lost.

    Only queues in the folders above it are found.

    Raises:
        UserError: it waits in one.
        MachineError: a queue cannot be read.
    """
    run = absolute(run.expanduser())
    if run.exists() and any((folder / FILE).is_file() and Queue(folder).contains(run) for folder in run.parents):
        raise _in_queue(run)


def _in_queue(run: Path) -> UserError:
    return UserError(f"{run}: in the queue already; cancel that job first, or choose another --out")
