"""The folder of one run: configuration, log, samples, checkpoints, the two LoRA files and a card."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from filelock import FileLock, Timeout

from unziplora.config.recipe import Recipe, read_toml, resolve, to_toml
from unziplora.errors import UserError
from unziplora.lora.blocks import BLOCK_MAPS
from unziplora.utils.files import absolute, atomic_folder, atomic_write, explain, write_png

if TYPE_CHECKING:
    from PIL import Image

R = TypeVar("R", bound=Recipe)

IMAGES = "images"
"""Subfolder for images that were in memory when the run began; it may exist before the run does."""

MERGED = "lora"
"""Name of the file in which content and style are one LoRA."""

_STEP = re.compile(r"step-(\d{6,})")
# Entries of a run that has learned nothing yet; such a folder is reused without asking.
_EARLY = {"config.toml", "log.jsonl", "samples", "checkpoints", IMAGES}


@dataclass(frozen=True)
class RunFolder:
    """One run on disk. Every file in it is written atomically.

    Attributes:
        path: the folder.
    """

    path: Path

    @property
    def config_file(self) -> Path:
        return self.path / "config.toml"

    @property
    def log_file(self) -> Path:
        return self.path / "log.jsonl"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def content(self) -> Path:
        return self.lora("content")

    @property
    def style(self) -> Path:
        return self.lora("style")

    def lora(self, name: str, layout: str = "kohya") -> Path:
        """Return the path of a LoRA in a layout."""
        return self.path / (f"{name}.safetensors" if layout == "kohya" else f"{name}.{layout}.safetensors")

    @property
    def card(self) -> Path:
        return self.path / "README.md"

    @classmethod
    @contextmanager
    def created(cls, path: Path, config: Recipe) -> Iterator[RunFolder]:
        """Create the folder of a new run, locked while the context is open, and write its configuration.

        An empty folder, or one of a run that has learned nothing yet, is reused. Paths become absolute.

        Raises:
            UserError: the folder contains something, or another process is using it.
            MachineError: no permission, disk full.
        """
        run = cls(path)
        run._check_free()  # before the lock, whose file would stay in someone else's folder
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise explain(path, error) from None
        with run.lock():
            run._check_free()
            try:
                run.log_file.unlink(missing_ok=True)
                run.samples.mkdir(exist_ok=True)
                run.checkpoints.mkdir(exist_ok=True)
            except OSError as error:
                raise explain(path, error) from None
            atomic_write(run.config_file, to_toml(with_absolute_paths(config)))
            yield run

    @classmethod
    def create(cls, path: Path, config: Recipe) -> RunFolder:
        """Create the folder of a new run as `created` does, and leave it unlocked."""
        with cls.created(path, config) as run:
            return run

    def _check_free(self) -> None:
        if not self.is_free():
            raise UserError(f"{self.path} {self._taken()}")

    def _taken(self) -> str:
        """Return why no new run can begin here, and the remedy, as the end of a sentence."""
        if not self.path.is_dir():
            return "is a file: choose another --out"
        if self.card.exists() and self.config_file.is_file():
            return "contains a finished run: choose another --out"
        if not self._begun():
            return "exists already and is not empty: choose another --out"
        return "contains an unfinished run: continue it with --resume, or choose another --out"

    def _begun(self) -> bool:
        """Return True if a run began here; a config.toml alone may be a file of the user's."""
        return self.config_file.is_file() and self.checkpoints.is_dir()

    @property
    def unfinished(self) -> bool:
        """True if a run began here and has not written its last file, the card."""
        return self._begun() and not self.card.exists()

    @classmethod
    @contextmanager
    def resumed(cls, path: Path, config: Recipe) -> Iterator[RunFolder]:
        """Open the folder of an interrupted run, locked while the context is open, and tidy it.

        Raises:
            UserError: there is no run, its settings differ in a key that decides what is learned, or another process
                is using it.
        """
        run = cls(path)
        saved = run.config(type(config))
        if names := changed_settings(saved, config):
            changes = [f"{name}: {getattr(saved, name)!r} → {getattr(config, name)!r}" for name in names]
            raise UserError(
                f"{path}: a run is resumed with the settings that it began with; these differ: {', '.join(changes)}. "
                "Leave them out, or start a new run with another --out"
            )
        with run.lock():  # before tidying, because another process may be writing
            run.tidy()
            yield run

    @classmethod
    def resume(cls, path: Path, config: Recipe) -> RunFolder:
        """Open the folder of an interrupted run as `resumed` does, and leave it unlocked."""
        with cls.resumed(path, config) as run:
            return run

    def config(self, model: type[R]) -> R:
        """Read the configuration that the run began with.

        Raises:
            UserError: this folder contains no run, or its configuration is damaged.
        """
        if not self.config_file.is_file():
            raise UserError(f"{self.path}: no run to resume here (it has no config.toml); leave --resume out")
        return resolve(model, read_toml(self.config_file))

    def is_free(self) -> bool:
        """Return True if a new run may begin here: no files but hidden ones, or a run that has learned nothing yet."""
        try:
            if self.path.exists() and not self.path.is_dir():
                return False
            names = {entry.name for entry in self.path.iterdir() if not entry.name.startswith(".")}
        except FileNotFoundError:
            return True
        except OSError as error:
            raise explain(self.path, error) from None
        if not names <= _EARLY or (names - {IMAGES} and not self._begun()):
            return False
        return self.latest() is None and not any(self.samples.glob("*"))

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes from training into this folder; the lock of a process that dies is released.

        Raises:
            UserError: another process is using it.
        """
        owner = self.path / ".lock.pid"
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(blocking=False)
        except Timeout:
            number = owner.read_text().strip() if owner.is_file() else ""
            raise UserError(
                f"{self.path}: process {number or 'unknown'} is training into this folder; "
                "wait for it, or choose another --out"
            ) from None
        except OSError as error:
            raise explain(self.path, error) from None
        try:
            with suppress(OSError):  # only the message of other processes needs it
                owner.write_text(str(os.getpid()))
            yield
        finally:
            lock.release()

    def tidy(self) -> None:
        """Remove half-written files of an interrupted process."""
        for parent in (self.path, self.samples, self.checkpoints):
            for leftover in parent.glob(".*"):
                if leftover.name.startswith(".tmp-"):
                    shutil.rmtree(leftover, ignore_errors=True)
                elif leftover.name != ".lock" and re.search(r"\.(toml|jsonl|png|md|safetensors)\.", leftover.name):
                    leftover.unlink(missing_ok=True)

    def checkpoint(self, step: int, fill: Callable[[Path], object]) -> Path:
        """Save a checkpoint atomically as `checkpoints/step-000200`, then delete the others.

        Args:
            step: steps done.
            fill: writes the files into a folder.

        Raises:
            MachineError: disk full, no permission; the previous checkpoint stays.
        """
        path = self.checkpoints / f"step-{step:06d}"
        atomic_folder(path, fill)
        for other in self.steps():
            if other != step:
                shutil.rmtree(self.checkpoints / f"step-{other:06d}", ignore_errors=True)
        return path

    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints, ascending."""
        names = [_STEP.fullmatch(entry.name) for entry in self.checkpoints.glob("step-*") if entry.is_dir()]
        return sorted(int(match[1]) for match in names if match)

    def latest(self) -> tuple[int, Path] | None:
        """Return steps done and folder of the newest complete checkpoint."""
        steps = self.steps()
        return (steps[-1], self.checkpoints / f"step-{steps[-1]:06d}") if steps else None

    def log(self, **fields: Any) -> None:
        """Append one line to log.jsonl; numbers that JSON lacks (NaN, infinity) become null.

        Raises:
            MachineError: disk full, no permission.
        """
        fields = {k: None if isinstance(v, float) and v - v != 0 else v for k, v in fields.items()}
        try:
            with self.log_file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(fields) + "\n")
        except OSError as error:
            raise explain(self.log_file, error) from None

    def read_log(self) -> list[dict[str, Any]]:
        """Return the lines of log.jsonl without half-written ones."""
        lines = []
        if self.log_file.is_file():
            for line in self.log_file.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    lines.append(json.loads(line))
                except ValueError:
                    continue
        return lines

    def rewind_log(self, step: int) -> None:
        """Delete log lines after a checkpoint, so that a resumed run does not log its steps twice."""
        lines = [line for line in self.read_log() if line.get("step", 0) <= step]
        atomic_write(self.log_file, "".join(json.dumps(line) + "\n" for line in lines))

    def save_image(self, name: str, image: Image.Image) -> Path:
        """Write a sample as `samples/NAME.png`.

        Raises:
            MachineError: disk full, no permission.
        """
        path = self.samples / f"{name}.png"
        write_png(path, image)
        return path


def with_absolute_paths(config: R) -> R:
    """Return the configuration with absolute paths, so that it works from any folder."""
    paths: dict[str, Any] = {}
    for name, value in config:
        if isinstance(value, Path) and name != "out":
            paths[name] = absolute(value)
        elif isinstance(value, list) and value and all(isinstance(item, Path) for item in value):
            paths[name] = [absolute(item) for item in value]
    for name in ("base", "blocks"):  # a path, or a name that stays one even if a file is called the same
        value = getattr(config, name, None)
        if value is not None and value not in BLOCK_MAPS and Path(value).expanduser().exists():
            paths[name] = str(absolute(Path(value).expanduser()))
    return config.model_copy(update=paths)


def changed_settings(saved: R, config: R) -> list[str]:
    """Return the keys in which two recipes differ, without those that may change when a run is resumed."""
    one, two = with_absolute_paths(saved), with_absolute_paths(config)
    skipped = two.marked("may_change")
    return [name for name, value in two if name not in skipped and value != getattr(one, name)]
