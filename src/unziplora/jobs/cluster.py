"""Ray: functions as tasks on the nodes of a cluster, with their progress and a stop that lets them save."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from unziplora.errors import Interrupted, MachineError, UnziploraError, UserError
from unziplora.utils.progress import Callback, Progress
from unziplora.utils.threads import Periodic

ANSWER = 20.0
"""Seconds in which a cluster must answer."""

PATIENCE = 120.0
"""Seconds in which tasks that were asked to stop must have saved."""

INTERVAL = 1.0
"""Seconds between two reports of a task."""

_PROBE = """
import sys, ray
ray.init(address=sys.argv[1], log_to_driver=False)
print(ray.get_runtime_context().gcs_address)
"""


def import_ray(flag: str) -> Any:
    """Return Ray, without its statistics and its output on the user's screen.

    Args:
        flag: what needs it, for the message.

    Raises:
        UserError: Ray is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "^")  # of the messages of its daemons, skips every line
    try:
        import ray
    except ImportError:
        raise UserError(f"{flag} needs Ray: pip install 'unziplora[ray]'") from None
    return ray


class Lost(MachineError):
    """A task whose process or node died."""


@dataclass(frozen=True)
class Task:
    """A call of an importable function in the main thread of a process on some node.

    Attributes:
        name: distinct among the tasks that run at the same time.
        function: called with the arguments and a `Reporter`.
        cpus: cores that it occupies.
        gpus: GPUs that it occupies.
        reuse: the process takes the next task; otherwise it ends and frees its GPU memory.
        avoided: ids of nodes on which it must not run.
    """

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    cpus: float = 1.0
    gpus: float = 0.0
    reuse: bool = True
    avoided: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """End of a task: its value, or the error with which it ended."""

    task: Task
    value: Any = None
    error: Exception | None = None


class Board:
    """Actor that collects the latest report of every task until the driver takes them."""

    def __init__(self) -> None:
        self.news: dict[str, tuple[Progress | None, bytes | None]] = {}

    def put(self, name: str, progress: Progress | None, files: bytes | None) -> None:
        """Replace the report of a task; files that nobody has taken stay until newer ones come."""
        self.news[name] = progress, files or self.news.get(name, (None, None))[1]

    def take(self) -> dict[str, tuple[Progress | None, bytes | None]]:
        """Return the reports since the last call."""
        news, self.news = self.news, {}
        return news


class Reporter(Periodic):
    """Progress callback inside a task: a thread sends the latest event every second.

    Attributes:
        new_files: returns files to send along.
    """

    def __init__(self, board: Any, name: str) -> None:
        super().__init__(INTERVAL)
        self.board, self.name = board, name
        self.new_files: Callable[[], bytes | None] = lambda: None
        self.latest: Progress | None = None
        self.sent: Progress | None = None

    def __call__(self, event: Progress) -> None:
        if event.steps:  # messages are in the log of the run
            self.latest = event

    def tick(self) -> bool:
        latest, files = self.latest, self.new_files()
        if files is not None or latest is not self.sent:
            self.board.put.remote(self.name, latest and replace(latest, message=None), files)
            self.sent = latest
        return True


def perform(board: Any, name: str, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """Call the function of a task on its node."""
    with Reporter(board, name) as report:
        return function(*args, report)


class Cluster:
    """A running Ray cluster, or else one of this machine's own, while the context is open.

    Attributes:
        tasks: those that have not ended, by the reference of their result.
        is_local: the cluster is this machine alone, started here.
    """

    def __init__(
        self,
        address: str | None = None,
        flag: str = "--engine ray",
        cpus: int | None = None,
        receive: Callable[[Task, bytes], object] = lambda task, files: None,
    ) -> None:
        """Prepare a connection.

        Args:
            address: "host:port", "auto" for a running cluster of this machine, "local" for a new one; default: a
                running one, else a new one.
            flag: what needs Ray, for messages.
            cpus: number of cores that a cluster started here counts; default: all.
            receive: called with files that a running task sends.

        Raises:
            UserError: Ray is not installed.
        """
        self.ray, self.address, self.cpus, self.receive = import_ray(flag), address, cpus, receive
        self.tasks: dict[Any, Task] = {}
        self.is_local, self.opened, self.shown = False, False, 0.0

    def __enter__(self) -> Cluster:
        """Connect.

        Raises:
            MachineError: the cluster does not answer.
        """
        ray = self.ray
        if not ray.is_initialized():
            address = self._find()
            self.is_local, self.opened = address is None, True
            local = {"num_cpus": self.cpus, "include_dashboard": False, "object_store_memory": 128 << 20}
            options = {"address": "local", **local} if address is None else {"address": address}
            ray.init(**options, log_to_driver=False, logging_level=logging.CRITICAL)
        here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=True
        )
        self.board = ray.remote(num_cpus=0, scheduling_strategy=here)(Board).remote()
        self.functions = {reuse: ray.remote(max_calls=0 if reuse else 1)(perform) for reuse in (True, False)}
        return self

    def __exit__(self, *_: object) -> None:
        if self.opened:
            self.ray.shutdown()

    def _find(self) -> str | None:
        """Return the address of a running cluster, None if one is to be started.

        Ray ends the process that connects to an address where nothing answers, so another process tries it.
        """
        if self.address == "local":
            return None
        required = self.address or os.environ.get("RAY_ADDRESS")
        command = [sys.executable, "-c", _PROBE, self.address or "auto"]
        try:
            probe = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER)
        except subprocess.TimeoutExpired:
            probe = None
        if probe is not None and probe.returncode == 0:
            return probe.stdout.split()[-1]
        if not required:
            return None
        if probe is not None and "Version mismatch" in probe.stderr:
            fault = " ".join(probe.stderr[probe.stderr.index("Version mismatch") :].split())
            raise MachineError(f"Ray cluster {required}: {fault}")
        if required == "auto":
            raise MachineError(
                "no Ray cluster runs on this machine: start one with `ray start --head`, or name its address"
            )
        raise MachineError(
            f"Ray cluster {required} does not answer: compare the address with the output of `ray start --head`, and "
            "see whether a firewall blocks the port"
        )

    def total(self, resource: str) -> float:
        """Return how much the cluster has of a resource: CPU, GPU."""
        return float(self.ray.cluster_resources().get(resource, 0))

    def nodes(self) -> dict[str, dict[str, Any]]:
        """Return the living nodes by their ids."""
        return {node["NodeID"]: node for node in self.ray.nodes() if node["Alive"]}

    def submit(self, task: Task) -> None:
        """Start a task as soon as a node has room for it."""
        options: dict[str, Any] = {"num_cpus": task.cpus, "num_gpus": task.gpus, "max_retries": 0, "name": task.name}
        if task.avoided:
            options["label_selector"] = {"ray.io/node-id": f"!in({','.join(task.avoided)})"}
        function = self.functions[task.reuse].options(**options)
        self.tasks[function.remote(self.board, task.name, task.function, task.args)] = task

    def wait(self, progress: Callback) -> list[Outcome]:
        """Wait half a second for the end of a task; return what has ended, and show the progress."""
        if not self.tasks:
            return []
        self.ray.wait(list(self.tasks), num_returns=1, timeout=0.5)
        ready, _ = self.ray.wait(list(self.tasks), num_returns=len(self.tasks), timeout=0)
        if time.monotonic() - self.shown >= INTERVAL:
            self.shown = time.monotonic()
            self._show(progress)
        return [self._outcome(ref) for ref in ready]

    def stop(self, progress: Callback) -> Iterator[Outcome]:
        """Ask all tasks to stop, as Ctrl-C does, and return what they end with."""
        for ref in self.tasks:
            self.ray.cancel(ref, recursive=False)
        end = time.monotonic() + PATIENCE
        while self.tasks and time.monotonic() < end:
            yield from self.wait(progress)

    def _show(self, progress: Callback) -> None:
        try:
            news = self.ray.get(self.board.take.remote(), timeout=ANSWER)
        except self.ray.exceptions.RayError:
            return  # tasks go on without being shown
        tasks = {task.name: task for task in self.tasks.values()}
        for name, (event, files) in news.items():
            if name in tasks and files is not None:
                self.receive(tasks[name], files)
            if name in tasks and event is not None:
                progress(replace(event, job=name))

    def _outcome(self, ref: Any) -> Outcome:
        task, faults = self.tasks.pop(ref), self.ray.exceptions
        try:
            return Outcome(task, self.ray.get(ref))
        except faults.TaskCancelledError:
            return Outcome(task, error=Interrupted("stopped"))
        except faults.RayTaskError as error:
            return Outcome(task, error=_explained(error))
        except faults.RayError as error:
            died = isinstance(error, (faults.NodeDiedError, faults.LocalRayletDiedError, faults.ObjectLostError))
            return Outcome(task, error=Lost("its node died" if died else "its process died"))


def _explained(error: Any) -> Exception:
    """Return the error inside a task, without Ray's traceback if it is a message for the user."""
    if isinstance(error.cause, UnziploraError):
        return error.cause
    if "No module named 'unziplora" in str(error):
        return MachineError(
            "a node of the cluster lacks this program: pip install 'unziplora[ray]' on every node, in "
            "the version that is installed here"
        )
    return RuntimeError(str(error).strip().splitlines()[-1])
