"""The folder of one run: configuration, log, samples, checkpoints, the two LoRA files and a card."""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from filelock import FileLock, Timeout

from unziplora.config.recipe import Recipe, resolve, to_toml
from unziplora.errors import MachineError, UserError
from unziplora.lora.blocks import BLOCK_MAPS
from unziplora.utils.files import (
    UNSUPPORTED,
    Writer,
    absolute,
    atomic_folder,
    atomic_write,
    explain,
    explained,
    remove_leftovers,
    safe_name,
    sync_folder,
    write_png,
)
from unziplora.utils.inputs import read_toml

if TYPE_CHECKING:
    from PIL import Image

    from unziplora.config.training import TrainingConfig

R = TypeVar("R", bound=Recipe)

IMAGES = "images"
"""Subfolder for images that were in memory when the run began; it may exist before the run does."""

MERGED = "lora"
"""Name of the LoRA that is content and style in one."""

LORAS = ("content", "style", MERGED)
"""Names of the LoRAs that a run may contain."""

SEEDS = "seeds"
"""Subfolder of a run for those of its seeds."""

LOCK, LOCK_OWNER, IMAGES_LOCK = ".lock", ".lock.pid", ".images"
"""Names of the lock of a process that trains into the folder, of the file with the number of the process, and of the
lock of a process that stored images in memory for the run that it begins."""

CHECKPOINTS = 2
"""Checkpoints that are kept: if the newest one is damaged, a run continues from the one before."""

_STEP = re.compile(r"step-(\d{6,})\.safetensors")
# Entries of a run that has learned nothing yet; such a folder is reused without asking.
_EARLY = {"config.toml", "log.jsonl", "samples", "checkpoints", "trackers", "worker.log", IMAGES}


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

    @property
    def name(self) -> str:
        """Name of the folder, as the names of its files begin: without what prompts and shells read as a sign."""
        return safe_name(absolute(self.path).name, "run", longest=50)

    def lora(self, name: str, layout: str = "kohya") -> Path:
        """Return the path of a LoRA in a layout, such as `cat-content.safetensors` in `runs/cat`.

        In a folder that was renamed, the file has its old name; in one older than these names, `content.safetensors`.
        """
        ending = f"{name}.safetensors" if layout == "kohya" else f"{name}.{layout}.safetensors"
        own = self.path / f"{self.name}-{ending}"
        if own.is_file():
            return own
        others = self.path.glob("*.safetensors") if self.config_file.is_file() else ()
        renamed = sorted(file for file in others if file.name.endswith(f"-{ending}"))
        return next((file for file in (self.path / ending, *renamed) if file.is_file()), own)

    def kept_lora(self, name: str, step: int, layout: str = "kohya") -> Path:
        """Return the path of a LoRA of an earlier step, such as `steps/cat-content-step000200.safetensors`."""
        ending = "safetensors" if layout == "kohya" else f"{layout}.safetensors"
        return self.path / "steps" / f"{self.name}-{name}-step{step:06d}.{ending}"

    def sheet(self, step: int) -> Path:
        """Return the path of the sample sheet of a step."""
        return self.samples / f"{self.name}-step{step:06d}.png"

    @property
    def loras(self) -> dict[str, Path]:
        """LoRA files that exist, in kohya's layout, by name."""
        return {name: file for name in LORAS if (file := self.lora(name)).is_file()}

    def lora_name(self, file: Path) -> str | None:
        """Return the name of the LoRA that a file of this run contains; None for other files."""
        names = ((name, layout) for name in LORAS for layout in ("kohya", "diffusers"))
        return next((name for name, layout in names if self.lora(name, layout) == file), None)

    @property
    def sheets(self) -> list[Path]:
        """Sample sheets, the last one last."""
        return sorted(self.samples.glob("*.png"), key=lambda path: path.stat().st_mtime)

    @property
    def card(self) -> Path:
        return self.path / "README.md"

    @property
    def check_file(self) -> Path:
        """Path of the figures of the check of the finished LoRAs; not every run has them."""
        return self.path / "check.json"

    @property
    def other_seeds(self) -> list[int]:
        """Seeds that this run was compared with; only a run of several seeds has them."""
        names = [entry.name for entry in (self.path / SEEDS).glob("*")]
        return sorted(int(name) for name in names if name.isdecimal())

    @property
    def unfinished(self) -> bool:
        """True if a run began here and has not written its last file, the card."""
        return self._begun() and not self.card.exists()

    @classmethod
    @contextmanager
    def created(cls, path: Path, config: Recipe) -> Iterator[RunFolder]:
        """Create the folder of a new run with its configuration, locked while the context is open.

        A new folder appears with its configuration in it. An empty folder, or one of a run that has learned nothing
        yet, is reused. Paths become absolute. If the context fails before anything is learned, no trace is left.

        Raises:
            UserError: the folder contains something, or another process is using it.
            MachineError: no permission, disk full.
        """
        run = cls(path)
        run.check_free()  # before the lock, whose file would stay in someone else's folder
        remove_leftovers(path.parent, re.escape(path.name))
        settings, first = to_toml(with_absolute_paths(config)), not run.config_file.exists()
        new = not path.exists() and atomic_folder(path, lambda folder: cls(folder)._furnish(settings))
        with explained(path):
            path.mkdir(parents=True, exist_ok=True)
        with run.lock():
            if not new:
                run.check_free()
                with explained(path):
                    run._furnish(settings)
            try:
                yield run
            except (UserError, MachineError):
                if first and run.is_free():
                    run._remove_traces()
                raise

    def _furnish(self, settings: str) -> None:
        """Lay out a run that has learned nothing yet; the configuration, which makes it one, comes last."""
        self.log_file.unlink(missing_ok=True)
        shutil.rmtree(self.path / "trackers", ignore_errors=True)
        self.samples.mkdir(exist_ok=True)
        self.checkpoints.mkdir(exist_ok=True)
        atomic_write(self.config_file, settings)

    def _remove_traces(self) -> None:
        """Remove the files of a run that has learned nothing, and the folder if nothing else is in it."""
        with suppress(OSError):
            for name in ("log.jsonl", "trackers", "config.toml", "samples", "checkpoints", LOCK_OWNER, LOCK):
                entry = self.path / name
                if entry.is_dir():
                    shutil.rmtree(entry)
                else:
                    entry.unlink(missing_ok=True)
            self.path.rmdir()

    @contextmanager
    def stored(self, images: Mapping[int, Image.Image], resume: bool = False) -> Iterator[dict[int, Path]]:
        """Store images that are in memory in the folder, before its run begins; if none begins, they go again.

        Args:
            images: by number.
            resume: the run began with the same images.

        Raises:
            UserError: the folder contains something, or another process is using it, or the run that is to be resumed
                began with other images.
        """
        from unziplora.images.files import as_png_keeps

        images = {number: as_png_keeps(image) for number, image in images.items()}
        files = {number: self.path / IMAGES / f"{number}.png" for number in images}
        if resume:
            for number, image in images.items():
                if not _shows(files[number], image):
                    self.check_unchanged([f"image {number}: different content"])
        if resume or not images:
            yield files
            return
        self.check_free()
        with explained(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        with self.lock(IMAGES_LOCK):  # two processes may begin a run here, and each would learn the last one's images
            self.check_free()
            try:
                for number, image in images.items():
                    write_png(files[number], image)
                yield files
            finally:
                if not self.config_file.exists():
                    self._remove_images(files.values())

    def _remove_images(self, files: Iterable[Path]) -> None:
        """Remove the images of a run that has not begun, and the folder if nothing else is in it."""
        with suppress(OSError):
            for file in (*files, self.path / f"{IMAGES_LOCK}.pid", self.path / IMAGES_LOCK):
                file.unlink(missing_ok=True)
            (self.path / IMAGES).rmdir()
            self.path.rmdir()

    def check_free(self) -> None:
        """Refuse a folder in which no new run can begin.

        Raises:
            UserError: it contains something.
        """
        if self.is_free():
            return
        if not self.path.is_dir():
            fault = "is a file"
        elif self.card.exists() and self.config_file.is_file():
            fault = "contains a finished run"
        elif self._begun():
            fault = "contains an unfinished run: continue it with --resume, or"
        else:
            fault = "exists already and is not empty"
        raise UserError(f"{self.path} {fault}{'' if fault.endswith('or') else ':'} choose another --out")

    def _begun(self) -> bool:
        # a config.toml alone may be a file of the user's
        return self.config_file.is_file() and self.checkpoints.is_dir()

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
        if not names <= _EARLY or (names - {IMAGES, "samples", "checkpoints"} and not self._begun()):
            return False
        return not any(self.checkpoints.glob("[!.]*")) and not any(self.samples.glob("[!.]*"))

    @classmethod
    @contextmanager
    def resumed(cls, path: Path, config: Recipe) -> Iterator[RunFolder]:
        """Open the folder of an interrupted run, locked while the context is open, and tidy it.

        Raises:
            UserError: there is no run, another process is using it, or it has no checkpoint yet and its settings differ
                in a key that decides what is learned. A checkpoint contains its settings.
        """
        run = cls(path)
        saved = run.config(type(config))
        if not run.steps() and not run.card.exists():
            run.check_settings(config)
        with run.lock():  # before tidying, because another process may be writing
            for folder in (path, run.samples, run.checkpoints, path / "steps"):
                remove_leftovers(folder)
            run.samples.mkdir(exist_ok=True)
            run.checkpoints.mkdir(exist_ok=True)
            if not run.card.exists():
                run._take_over(saved, config)
            yield run

    def _take_over(self, saved: R, config: R) -> None:
        """Store the settings that were changed for the rest of the run, so that the next process has them too."""
        changes = {name: getattr(config, name) for name in config.marked("may_change")}
        settings = to_toml(with_absolute_paths(saved.model_copy(update=changes)))
        if settings != to_toml(with_absolute_paths(saved)):
            atomic_write(self.config_file, settings)

    def settings_to_extend(self, model: type[R], steps: int) -> dict[str, Any]:
        """Return the settings of this finished run with so many more steps.

        Raises:
            UserError: there is no finished run here, or its configuration is damaged.
        """
        if self.unfinished:
            raise UserError(f"{self.path}: this run is not finished; continue it with --resume, then extend it")
        if not self.config_file.is_file():
            raise UserError(f"{self.path}: no run to extend here (it has no config.toml)")
        saved = self.settings(model)
        if "steps" not in saved:
            raise UserError(f"{self.config_file}: it has no number of steps, so this run cannot be extended")
        return {**saved, "steps": saved["steps"] + steps}

    def reopen(self, config: Recipe) -> None:
        """Make a finished run an unfinished one with more steps.

        Raises:
            MachineError: disk full, no permission.
        """
        with explained(self.card):
            self.card.unlink()  # first, because its checkpoint is finished by the old configuration too
        atomic_write(self.config_file, to_toml(with_absolute_paths(config)))

    def check_extendable(self, config: TrainingConfig, extendable: bool = True) -> None:
        """Refuse to resume a finished run that cannot be extended.

        Args:
            extendable: the method can go on after its last step.

        Raises:
            UserError: it has as many steps, or no checkpoint.
        """
        if not self.card.exists():  # the last file to be written
            return
        if not extendable or config.steps <= self.config(type(config)).steps:
            raise UserError(f"{self.path}: this run is finished; choose another --out for a new one")
        if not self.steps():
            raise UserError(f"{self.checkpoints}: no checkpoint to extend this run from; choose another --out")

    def check_settings(self, config: Recipe) -> None:
        """Refuse to resume a run with other settings than it began with; a finished one may have more steps.

        Raises:
            UserError: a key that decides what is learned differs.
        """
        saved, extended = self.config(type(config)), {"steps"} if self.card.exists() else set()
        keys = [name for name in changed_settings(saved, config) if name not in extended]
        self.check_unchanged([f"{name}: {getattr(saved, name)!r} → {getattr(config, name)!r}" for name in keys])

    def check_unchanged(self, changes: Sequence[str]) -> None:
        """Refuse to resume a run in which something that decides what is learned is not as it was.

        Raises:
            UserError: the changes.
        """
        if changes:
            raise UserError(
                f"{self.path}: a run is resumed with the settings and files that it began with; these differ: "
                f"{', '.join(changes)}. Leave changed settings out and restore changed files, or start a new run with "
                "another --out"
            )

    def config(self, model: type[R]) -> R:
        """Read the configuration that the run began with.

        The file has every key of the version that wrote it. A newer key is at its default, not as a preset has it now.

        Raises:
            UserError: this folder contains no run, or its configuration is damaged.
        """
        if not self.config_file.is_file():
            raise UserError(f"{self.path}: no run to resume here (it has no config.toml); leave --resume out")
        settings = read_toml(self.config_file)
        fields = {name: field for name, field in model.model_fields.items() if not field.is_required()}
        defaults = {name: field.get_default(call_default_factory=True) for name, field in fields.items()}
        try:
            return resolve(model, {name: value for name, value in defaults.items() if value is not None}, settings)
        except UserError as error:
            raise UserError(
                f"{self.config_file}: {error}\nThis is a run of another command, or the file was edited or is damaged"
            ) from None

    def settings(self, model: type[R]) -> dict[str, Any]:
        """Read the keys that the run began with, as a layer for `resolve`. Errors as in `config`."""
        return self.config(model).model_dump(exclude_unset=True)

    @contextmanager
    def lock(self, name: str = LOCK) -> Iterator[None]:
        """Keep other processes from training into this folder; the lock of a process that dies is released.

        A drive without locks brings a warning.

        Args:
            name: of the lock's file.

        Raises:
            UserError: another process is using it.
        """
        owner = self.path / f"{name}.pid"
        lock = FileLock(self.path / name, fallback_to_soft=False)
        held = try_lock(lock, self.path)
        if held is False:
            number = owner.read_text(errors="replace").strip() if owner.is_file() else ""
            raise UserError(
                f"{self.path}: process {number or 'unknown'} is training into this folder; "
                "wait for it, or choose another --out"
            )
        if held is None:
            warnings.warn(f"{self.path}: this drive has no locks; let only one process train here", stacklevel=4)
        try:
            with suppress(OSError):  # only the message of other processes needs it
                owner.write_text(str(os.getpid()))
            yield
        finally:
            with suppress(OSError):
                owner.unlink(missing_ok=True)
            lock.release()

    def checkpoint(self, step: int, write: Writer) -> Path:
        """Save a checkpoint atomically as `checkpoints/step-000200.safetensors`; keep the one before, delete others.

        Args:
            step: steps done.
            write: writes the checkpoint into an open file.

        Raises:
            MachineError: disk full, no permission; the previous checkpoints stay.
        """
        path = self.checkpoint_file(step)
        atomic_write(path, write)
        sync_folder(self.checkpoints)
        steps = [other for other in self.steps() if other <= step]
        for other in self.steps():
            if other not in steps[-CHECKPOINTS:]:
                self.checkpoint_file(other).unlink(missing_ok=True)
        return path

    def drop_checkpoints(self, keep: int = 1) -> None:
        """Delete all checkpoints but the last, which a finished run needs to be extended."""
        for step in self.steps()[: -keep or None]:
            self.checkpoint_file(step).unlink(missing_ok=True)

    def checkpoint_file(self, step: int) -> Path:
        """Return the path of a checkpoint."""
        return self.checkpoints / f"step-{step:06d}.safetensors"

    def steps(self) -> list[int]:
        """Return the steps of the checkpoints, ascending; some may be damaged."""
        names = [_STEP.fullmatch(entry.name) for entry in self.checkpoints.glob("step-*")]
        return sorted(int(match[1]) for match in names if match)

    def log(self, **fields: Any) -> None:
        """Append one line to log.jsonl; numbers that JSON lacks (NaN, infinity) become null.

        Raises:
            MachineError: disk full, no permission.
        """
        fields = {k: None if isinstance(v, float) and v - v != 0 else v for k, v in fields.items()}
        with explained(self.log_file), self.log_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(fields) + "\n")

    def read_log(self) -> list[dict[str, Any]]:
        """Return the lines of log.jsonl without damaged and half-written ones."""
        lines = []
        if self.log_file.is_file():
            for line in self.log_file.read_text(encoding="utf-8", errors="replace").splitlines():
                with suppress(ValueError, RecursionError):
                    lines.append(json.loads(line))
        return [line for line in lines if isinstance(line, dict) and isinstance(line.get("step", 0), int)]

    def rewind_log(self, step: int) -> None:
        """Delete log lines after a checkpoint, so that a resumed run does not log its steps twice."""
        lines = [line for line in self.read_log() if line.get("step", 0) <= step]
        atomic_write(self.log_file, "".join(json.dumps(line) + "\n" for line in lines))


def _shows(file: Path, image: Image.Image) -> bool:
    """Check whether a file that this package wrote contains an image."""
    from PIL import Image

    if not file.is_file():
        return False
    with Image.open(file) as stored:
        return stored.convert("RGBA").tobytes() == image.convert("RGBA").tobytes()


def located(config: Recipe) -> dict[str, Any]:
    """Return the settings that are locations, by key, as absolute paths.

    Names of bases and block maps are not, even if there is a file of that name.
    """
    paths: dict[str, Any] = {}
    for name, value in config:
        if isinstance(value, Path):
            paths[name] = absolute(value)
        elif isinstance(value, list) and value and all(isinstance(item, Path) for item in value):
            paths[name] = [absolute(item) for item in value]
    for name in ("base", "blocks", "dino", "clip"):
        value = getattr(config, name, None)
        if value is not None and value not in BLOCK_MAPS and Path(value).expanduser().exists():
            paths[name] = str(absolute(Path(value).expanduser()))
    return paths


def with_absolute_paths(config: R) -> R:
    """Return the configuration with absolute paths, so that it works from any folder."""
    return config.model_copy(update=located(config))


def changed_settings(saved: R, config: R) -> list[str]:
    """Return the keys in which two recipes differ, without those that may change when a run is resumed."""
    one, two = with_absolute_paths(saved), with_absolute_paths(config)
    skipped = two.marked("may_change")
    return [name for name, value in two if name not in skipped and value != getattr(one, name)]


def try_lock(lock: FileLock, folder: Path) -> bool | None:
    """Acquire a lock in a folder; return False if another process has it, None if the drive has no locks.

    Raises:
        MachineError: disk full, no permission.
    """
    try:
        lock.acquire(timeout=0.2, poll_interval=0.01)  # somebody may just be looking whether it is held
    except Timeout:
        return False
    except NotImplementedError:
        return None
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise explain(folder, error) from None
        return None
    return True
