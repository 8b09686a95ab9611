"""State of a run, computed from its folder and never stored, so that it is right after any kill."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from unziplora.errors import UnziploraError, UserError
from unziplora.jobs.claim import OWNER, is_worked_on
from unziplora.runs.folder import LOCK_OWNER, RunFolder
from unziplora.utils.files import atomic_write
from unziplora.utils.inputs import read_json, read_toml

State = Literal["queued", "running", "interrupted", "failed", "finished", "missing"]

ERROR, LOG = ".error.json", "worker.log"
LOG_LINES = 30
"""Lines of a log that are shown."""


def state_of(run: RunFolder, queued: bool = False) -> State:
    """Compute the state of a run.

    Args:
        queued: a queue contains it, so that it may wait for its first step.
    """
    try:
        names = set(os.listdir(run.path))
    except (FileNotFoundError, NotADirectoryError):
        return "missing"
    except PermissionError:
        return "failed"
    # first, because the card of a finished run stays until its extension has loaded the base
    if not names.isdisjoint((OWNER, LOCK_OWNER)) and is_worked_on(run):
        return "running"
    if run.card.name in names:
        return "finished"
    if ERROR in names and _is_last(run):
        return "failed"
    return "queued" if queued and run.log_file.name not in names else "interrupted"


def is_open(run: RunFolder) -> bool:
    """Return True if there is work to do on a run: it is neither finished nor failed."""
    failed = (run.path / ERROR).exists() and _is_last(run)
    return run.path.is_dir() and not run.card.exists() and not failed


def _is_last(run: RunFolder) -> bool:
    """Return True if no process has trained since the error was left."""
    try:
        return (run.path / ERROR).stat().st_mtime >= run.log_file.stat().st_mtime
    except OSError:
        return not run.log_file.exists()


@dataclass(frozen=True)
class Failure:
    """Error that the last process of a run left.

    Attributes:
        message: the fault and its remedy.
        log: the last lines of the log.
    """

    message: str
    log: list[str]


def record_failure(run: RunFolder, error: BaseException) -> None:
    """Write the error that ended the process of a run into its folder, unless that is gone.

    Raises:
        MachineError: disk full, no permission.
    """
    if run.path.is_dir():
        atomic_write(run.path / ERROR, json.dumps({"message": str(error).strip() or type(error).__name__}))


def clear_failure(run: RunFolder) -> None:
    """Forget the error of an earlier process: the run is tried again."""
    (run.path / ERROR).unlink(missing_ok=True)


def read_failure(run: RunFolder) -> Failure | None:
    """Return the error that the last process of a run left, if there is one."""
    try:
        message = read_json(run.path / ERROR)["message"]
    except FileNotFoundError:
        return None
    except (OSError, UserError, KeyError):
        message = "its error cannot be read"
    return Failure(str(message), log_tail(run))


def log_tail(run: RunFolder) -> list[str]:
    """Return the last lines of the log that the processes of a run left."""
    log = run.path / LOG
    return log.read_text("utf-8", errors="replace").splitlines()[-LOG_LINES:] if log.is_file() else []


@dataclass(frozen=True)
class RunSummary:
    """A run as lists show it."""

    run: RunFolder

    @property
    def state(self) -> State:
        return state_of(self.run)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Keys that the run began with; empty if its configuration is damaged."""
        try:
            return read_toml(self.run.config_file)
        except UnziploraError:
            return {}

    @property
    def words(self) -> dict[str, str]:
        """Words of the content and the style, as far as the run has them."""
        return {name: str(self.settings[name]) for name in ("content", "style") if self.settings.get(name)}

    @property
    def steps(self) -> int | None:
        """Steps of the whole run, those of all seeds; 0 for a merge that trains nothing; None if that is not known."""
        if self.settings.get("method", "zip") != "zip":
            return 0
        steps, seeds = self.settings.get("steps"), self.settings.get("seeds", 1)
        return steps * seeds if isinstance(steps, int) and isinstance(seeds, int) else None

    @property
    def changed(self) -> float:
        """Time of the last sign of life, in seconds since 1970."""
        files = (self.run.config_file, self.run.log_file, self.run.card)
        return max((path.stat().st_mtime for path in files if path.exists()), default=0.0)

    @property
    def images(self) -> list[Path]:
        """Image files that the run learns from; none if its configuration, which may be anybody's, has no such list."""
        images = self.settings.get("images")
        return [Path(str(image)) for image in images] if isinstance(images, list) else []

    def as_dict(self, queued: bool = False) -> dict[str, Any]:
        """Return the figures for JSON; the steps done are those of the log.

        Args:
            queued: as in `state_of`.
        """
        state = state_of(self.run, queued)
        about = {"run": str(self.run.path), "state": state}
        try:
            return {**about, **self._figures(state)}
        except PermissionError as error:
            nothing = {"steps_done": 0, "steps": None, "changed": 0.0}
            return {**about, **nothing, "error": f"{error.filename}: no permission"}

    def _figures(self, state: State) -> dict[str, Any]:
        steps = [line["step"] for line in self.run.read_log()[-1:] if isinstance(line.get("step"), int)]
        failure = read_failure(self.run) if state == "failed" else None
        return {
            **self.words,
            "steps_done": steps[0] if steps else 0,
            "steps": self.steps,
            "changed": self.changed,
            **({"error": failure.message} if failure else {}),
        }

    def matches(self, word: str) -> bool:
        """Return True if a word occurs in the folder's name, the words, the prompts or the images' names."""
        settings = self.settings
        texts = [self.run.path.name, *(str(value) for key, value in settings.items() if key.endswith("prompt"))]
        texts += [*self.words.values(), *(image.name for image in self.images)]
        return any(word.casefold() in text.casefold() for text in texts)


def find_runs(folder: str | os.PathLike[str] = "runs", words: Sequence[str] = ()) -> list[RunSummary]:
    """Return the runs in a folder and in its subfolders, the newest first.

    Args:
        words: each must occur in a run's name, words, prompts or image names.
    """
    runs = [RunSummary(RunFolder(path)) for path in _run_folders(Path(folder).expanduser(), depth=2)]
    matches = [run for run in runs if all(run.matches(word) for word in words)]
    return sorted(matches, key=lambda run: -run.changed)


def _run_folders(folder: Path, depth: int) -> Iterator[Path]:
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not path.is_dir():
            continue
        try:
            names = os.listdir(path)
        except PermissionError:
            warnings.warn(f"{path}: no permission to read this folder; it is left out", stacklevel=3)
            continue
        except FileNotFoundError:  # deleted meanwhile
            continue
        if "config.toml" in names:
            yield path
        elif depth > 1:
            yield from _run_folders(path, depth - 1)
