"""Engines of a batch. On a Ray cluster each run is a task, which continues elsewhere if its process or node dies."""

from __future__ import annotations

import secrets
import shutil
import signal
import tempfile
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from unziplora.config.bases import is_bundled
from unziplora.config.training import TrainingConfig
from unziplora.errors import Interrupted, MachineError, UnziploraError, UserError
from unziplora.jobs.batch import Engine, Result, Results, claim_row, in_this_process
from unziplora.jobs.claim import HEARTBEAT, Claim
from unziplora.jobs.cluster import Cluster, Lost, Outcome, Reporter, Task, import_ray
from unziplora.jobs.parcel import inputs, pack_results, pack_run, unpack_results, unpack_run
from unziplora.jobs.rows import Row
from unziplora.jobs.state import record_failure
from unziplora.jobs.trainings import Trainer, config_of, needs_base
from unziplora.jobs.worker import Train, execute
from unziplora.runs.folder import LOCK, RunFolder
from unziplora.utils.files import files_below
from unziplora.utils.progress import Callback, Progress
from unziplora.utils.signals import STOP, caught

EngineName = Literal["local", "ray"]

MARK = ".here"
"""File in a run folder by which a node recognizes a shared disk."""

SCRATCH = "unziplora-"
"""Beginning of the names of temporary folders on nodes that do not share the disk."""

AHEAD = 8
"""Runs that wait in the cluster beyond twice those that it has room for."""

trainer: Train = Trainer()
"""Trainer of a process of the cluster, whose base stays loaded."""


@dataclass(frozen=True)
class Parcel:
    """A run as a task receives it.

    Attributes:
        run: its folder on the driver's machine.
        mark: content of the file `MARK` in it; None: the task runs on that machine.
        files: reference of the packed run in a list, from which Ray does not fetch it by itself.
        threads: number of threads; 0: as many as torch chooses.
    """

    run: Path
    mark: str | None
    files: list[Any]
    threads: int


@dataclass(frozen=True)
class Report:
    """End of a run on a node.

    Attributes:
        outcome: "no base" if the node has none.
        node: its id.
        reason: of a failure, or the base.
        files: the packed run, unless the disk is shared.
    """

    outcome: Literal["finished", "failed", "interrupted", "no base"]
    node: str = ""
    reason: str = ""
    files: bytes | None = None


def pick_engine(name: EngineName, address: str | None = None) -> Engine:
    """Return the engine of a name.

    Args:
        address: of the cluster, for the engine "ray"; see `Cluster`.

    Raises:
        UserError: no such engine, Ray is not installed, or an address is given to the other engine.
    """
    if name == "ray":
        import_ray("--engine ray")
        return partial(_train_rows, address=address)
    if name != "local":
        raise UserError(f"engine {name!r}: choose local or ray")
    if address is not None:
        raise UserError("an address is that of a Ray cluster: choose the engine ray too")
    return in_this_process(Trainer())


def train_run(parcel: Parcel, progress: Reporter) -> Report:
    """Train a run on the node of a task: in its folder if this node sees it, else in a copy that is sent back."""
    if parcel.threads:
        import torch

        torch.set_num_threads(parcel.threads)
    if parcel.mark is None or _is_here(parcel):
        return _train(RunFolder(parcel.run), progress)
    import ray

    with scratch_folder(parcel.mark) as scratch:
        run = unpack_run(ray.get(parcel.files[0]), scratch)
        progress.new_files = NewCheckpoint(run)
        report = _train(run, progress)
        return replace(report, files=pack_results(run))


@contextmanager
def scratch_folder(name: str) -> Iterator[Path]:
    """Make a temporary folder, and remove those that processes left when they were killed: nobody locks them now."""
    parent = Path(tempfile.gettempdir())
    for lock in parent.glob(f"{SCRATCH}*/{LOCK}"):
        with suppress(OSError, Timeout), FileLock(lock, blocking=False):
            shutil.rmtree(lock.parent, ignore_errors=True)
    folder = parent / f"{SCRATCH}{name}"
    folder.mkdir()
    with FileLock(folder / LOCK):
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _is_here(parcel: Parcel) -> bool:
    """Return True if this node sees the run folder of the driver and all files that its settings name."""
    with suppress(OSError):
        if (parcel.run / MARK).read_text() == parcel.mark:
            return all(path.exists() for _, path in inputs(config_of(RunFolder(parcel.run))))
    return False


def _train(run: RunFolder, progress: Callback) -> Report:
    config = config_of(run)
    if needs_base(config) and Path(config.base).is_absolute() and not Path(config.base).exists():
        import ray

        return Report("no base", ray.get_runtime_context().get_node_id(), config.base)
    try:
        error = execute(Claim(run), trainer, progress)  # the driver has the claim
    except (Interrupted, KeyboardInterrupt):
        return Report("interrupted")
    return Report("finished") if error is None else Report("failed", reason=str(error))


class NewCheckpoint:
    """The files of a run that are new since the last call, packed, whenever there is a checkpoint among them."""

    def __init__(self, run: RunFolder) -> None:
        self.run = run
        self.seen = self._state()

    def __call__(self) -> bytes | None:
        state = self._state()
        new = [path for path, changed in state.items() if self.seen.get(path) != changed]
        if not any(path.parent.name == self.run.checkpoints.name for path in new):
            return None
        self.seen = state
        return pack_results(self.run, new)

    def _state(self) -> dict[Path, int]:
        """Return the times at which the files changed, by path in the run."""
        state = {}
        for path in files_below(self.run.path):
            with suppress(OSError):  # a newer one has replaced it
                state[path] = (self.run.path / path).stat().st_mtime_ns
        return state


@dataclass(frozen=True)
class _Run:
    """A run of the batch in the hands of the cluster."""

    row: Row
    name: str
    claim: Claim
    started: float

    @property
    def folder(self) -> RunFolder:
        return self.claim.run


def _train_rows(rows: Sequence[Row], progress: Callback, address: str | None) -> Results:
    driver = _Driver(progress, address, Counter(row.config.out.name for row in rows))
    progress(Progress(message="starting Ray"))
    with driver.cluster, caught(signal.default_int_handler, *STOP):
        try:
            yield from driver.train(deque(rows))
        except BaseException as error:
            results = [*driver.stop()]
            if not isinstance(error, GeneratorExit):
                yield from results
            raise
        finally:
            driver.release()


class _Driver:
    """The process that hands the rows of a batch to a cluster."""

    def __init__(self, progress: Callback, address: str | None, names: Counter[str]) -> None:
        self.progress, self.names = progress, names
        self.cluster = Cluster(address, receive=self.receive)
        self.runs: dict[str, _Run] = {}
        self.beat = 0.0

    def train(self, rows: deque[Row]) -> Results:
        """Keep the cluster busy until all rows have ended."""
        cluster = self.cluster
        room = AHEAD + 2 * int(cluster.total("GPU") or cluster.total("CPU"))
        while rows or cluster.tasks:
            while rows and len(cluster.tasks) < room:
                if (result := self.start(rows.popleft())) is not None:
                    yield result
            for outcome in cluster.wait(self.progress):
                if (result := self.settle(outcome)) is not None:
                    yield result
            self.renew_claims()

    def start(self, row: Row) -> Result | None:
        """Submit a row; return its result if there is nothing to do, or nothing can be done."""
        claim = claim_row(row)
        if isinstance(claim, Result):
            return claim
        path = row.config.out
        name = path.name if self.names[path.name] == 1 else str(path)
        run = self.runs[name] = _Run(row, name, claim, time.monotonic())
        try:
            self.cluster.submit(self.task(run))
        except UnziploraError as error:
            return self.end(run, "failed", str(error))
        return None

    def task(self, run: _Run, avoided: tuple[str, ...] = ()) -> Task:
        """Make the task of a run, from the state of its folder."""
        run.claim.check_attempts()
        cpus, gpus = self.resources(run.row.config)
        mark, files = None, []
        if not self.cluster.is_local:
            mark, files = secrets.token_hex(8), [self.cluster.ray.put(pack_run(run.folder))]
            (run.folder.path / MARK).write_text(mark)
        parcel = Parcel(run.folder.path.absolute(), mark, files, 0 if gpus else cpus)
        return Task(run.name, train_run, (parcel,), cpus, gpus, reuse=not gpus, avoided=avoided)

    def resources(self, config: TrainingConfig) -> tuple[int, int]:
        """Return the cores and GPUs of a run: one GPU if there are any, else a core for the small base, else a node."""
        on_gpu = config.device.startswith("cuda") or (config.device == "auto" and self.cluster.total("GPU") > 0)
        if not needs_base(config) or on_gpu or is_bundled(config.base):
            return 1, int(on_gpu and needs_base(config))
        return max(1, min(int(node["Resources"].get("CPU", 1)) for node in self.cluster.nodes().values())), 0

    def receive(self, task: Task, files: bytes) -> None:
        """Store a checkpoint of a run that is being trained elsewhere."""
        unpack_results(files, self.runs[task.name].folder)

    def settle(self, outcome: Outcome, stopping: bool = False) -> Result | None:
        """Process the end of a task; return the result of its row, or None if it continues."""
        run, error = self.runs[outcome.task.name], outcome.error
        report = outcome.value if error is None else Report("interrupted", reason=str(error))
        try:
            if report.files is not None:
                unpack_results(report.files, run.folder)
            if error is not None and not isinstance(error, (Lost, Interrupted)):
                raise error
            if report.outcome in ("finished", "failed"):
                return self.end(run, report.outcome, report.reason)
            if not stopping:
                self.go_on(run, outcome.task, report)
        except Exception as fault:
            record_failure(run.folder, fault)
            return self.end(run, "failed", str(fault))
        return None

    def go_on(self, run: _Run, task: Task, report: Report) -> None:
        """Submit a run again: elsewhere if the node lacks the base."""
        avoided = task.avoided
        if report.outcome == "no base":
            avoided = (*avoided, report.node)
            nodes = self.cluster.nodes()
            where = ", ".join(str(nodes.get(node, {}).get("NodeName", node)) for node in avoided)
            fault = f"{report.reason} is missing on the node {where}: put the base at this path on every node"
            if nodes.keys() <= set(avoided):
                raise MachineError(f"{fault}, or name one of the hub, which each node downloads")
            self.progress(Progress(message=f"{fault}; this run goes to another node", job=run.name))
        else:
            run.claim.begin()
            reason = report.reason or "its process was asked to stop"  # by the system, not by the user
            self.progress(Progress(message=f"{reason}. It goes on from its last checkpoint", job=run.name))
        self.cluster.submit(self.task(run, avoided))

    def end(self, run: _Run, outcome: Literal["finished", "failed"], reason: str) -> Result:
        """Give a run back."""
        self.give_back(self.runs.pop(run.name))
        return Result(run.row, outcome, reason, time.monotonic() - run.started)

    def stop(self) -> Results:
        """Let all runs save their step; return those that ended meanwhile."""
        if self.cluster.tasks:
            self.progress(Progress(message="stopping, so that every run saves its step; Ctrl-C again does not wait"))
        for outcome in self.cluster.stop(self.progress):
            if (result := self.settle(outcome, stopping=True)) is not None:
                yield result

    def renew_claims(self) -> None:
        """Renew the heartbeats of all claims."""
        if time.monotonic() - self.beat > HEARTBEAT / 6:
            self.beat = time.monotonic()
            for run in self.runs.values():
                run.claim.beat()

    def release(self) -> None:
        """Give all runs back."""
        for run in self.runs.values():
            self.give_back(run)

    def give_back(self, run: _Run) -> None:
        """Release the claim to a run."""
        with suppress(OSError):
            (run.folder.path / MARK).unlink(missing_ok=True)
        run.claim.release()
