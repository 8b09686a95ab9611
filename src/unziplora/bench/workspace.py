"""Folder of a benchmark: each training runs once there and continues after an interruption."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from unziplora.bench.cases import Case, Example
from unziplora.config.bench import BenchConfig
from unziplora.config.recipe import resolve
from unziplora.config.split import SplitConfig
from unziplora.config.training import TrainingConfig
from unziplora.errors import UserError
from unziplora.jobs.trainings import function_of
from unziplora.models.base import Base
from unziplora.runs.folder import RunFolder, changed_settings
from unziplora.utils.files import atomic_write, write_png

WEIGHTS = "weights.txt"
"""File with the fingerprint of the base's weights."""

PATHS = {"out", "images", "masks", "content_lora", "style_lora", "content_images", "style_images"}
"""Keys of recipes that are locations of files and do not affect the result."""

FRAMING = {"crop", "fit"}
"""Keys that change nothing about the benchmark's images, which are squares of the base's size."""

CHOICE = {"seeds", "dino", "clip"}
"""Keys that choose between finished runs; the benchmark measures each."""

R = TypeVar("R", bound=TrainingConfig)


@dataclass(frozen=True)
class Workspace:
    """Folder of a benchmark.

    Attributes:
        config: recipe of the benchmark.
        folder: absolute path.
        overrides: settings by method; a method with several trainings has a table for each.
        method_folders: folders of other benchmarks by method, for methods whose runs are already there.
    """

    config: BenchConfig
    folder: Path
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    method_folders: Mapping[str, Path] = field(default_factory=dict)

    def claim(self, base: Base) -> None:
        """Record the fingerprint of the base's weights, because results of other weights must not be mixed in.

        Raises:
            UserError: the results in the folder come from other weights of the same name.
        """
        path, current = self.folder / WEIGHTS, base.fingerprint()
        if not path.is_file():
            atomic_write(path, current + "\n")
        elif (recorded := path.read_text(encoding="utf-8").strip()) != current:
            raise UserError(
                f"{self.folder}: measured with other weights of base {self.config.base!r} ({recorded}; these are "
                f"{current}): choose another --out, or the version of the base that it was measured with"
            )

    def run_folder(self, method: str, case: Case, seed: int) -> Path:
        """Return the folder of one method's trainings on a case."""
        return self.method_folders.get(method, self.folder) / "runs" / method / case.slug / f"seed-{seed}"

    def training_folder(self, method: str, case: Case, seed: int, training: str) -> Path:
        """Return the run folder of one of a method's trainings on a case."""
        return self.run_folder(method, case, seed) / training

    def settings(self, method: str) -> dict[str, Any]:
        """Return the overrides of a method."""
        return dict(self.overrides.get(method, {}))

    def shared_settings(self, case: Case, seed: int) -> dict[str, Any]:
        """Return the keys that all trainings on a case have in common."""
        shared = self.config.model_dump(include={"base", "token", "precision", "device"})
        images = self.image_files(case, "input", [Example(case.content, (case.image,))])
        return {**shared, "images": images, "seed": seed, "sample_seeds": []}

    def recipe(
        self, model: type[R], method: str, case: Case, seed: int, training: str, *settings: Mapping[str, Any]
    ) -> R:
        """Resolve the recipe of one training of a method; later settings win."""
        shared = {name: value for name, value in self.shared_settings(case, seed).items() if name in model.model_fields}
        out = self.training_folder(method, case, seed, training)
        return resolve(model, shared, *map(dict, settings), {"out": out})

    def image_files(self, case: Case, name: str, examples: Sequence[Example]) -> list[Path]:
        """Write images of a case as files for trainings, each once; the file name contains a hash of the image."""
        paths = []
        for number, image in enumerate(image for example in examples for image in example.images):
            digest = hashlib.sha256(image.tobytes()).hexdigest()[:8]
            path = self.folder / "cases" / case.slug / f"{name}-{number}-{digest}.png"
            if not path.is_file():
                write_png(path, image)
            paths.append(path)
        return paths

    def train_once(self, config: TrainingConfig) -> RunFolder:
        """Return the finished run of a recipe; train, or continue from the last checkpoint, if it is not finished.

        Raises:
            UserError: the folder contains a run with other settings; or as the training.
            MachineError, Interrupted: as the training.
        """
        run = RunFolder(config.out)
        if run.config_file.is_file() and (run.card.exists() or run.steps()):
            check_settings(run, config)
        if run.card.exists():
            return run
        run = function_of(config)(config, resume=run.unfinished and not run.is_free())
        run.drop_checkpoints(keep=0)  # nobody extends these runs, of which there are hundreds
        return run


def training_settings(config: TrainingConfig) -> dict[str, Any]:
    """Return the settings of a recipe that affect the result: no file locations, no device.

    Keys that were renamed or merged appear under their old names, so that results stored before remain valid.
    """
    without = PATHS | CHOICE | FRAMING | {"device", "cuda_graphs", "save_every"}
    settings = config.model_dump(mode="json", exclude=without)
    settings["sample_steps"] = settings.pop("generated_steps")
    settings["sample_guidance"] = settings.pop("generated_guidance")
    if isinstance(config, SplitConfig):  # as before there was a choice
        for key, only in {"targets": ["attention"], "style_variants": False}.items():
            if settings[key] == only:
                del settings[key]
    if settings.get("method") != "null-space":
        settings.pop("projection", None)
    if "official_code" in settings:
        official = settings.pop("official_code")
        settings |= {"column_score": "threshold" if official else "importance", "score_scaled": official}
        settings |= {"column_choice": "strict" if official else "exact", "scale_gradient": "overlap"}
        settings |= {"init": "gaussian" if official else "zeros", "decay_masked": official}
    return settings


def json_hash(value: Any) -> str:
    """Return the first 16 hexadecimal digits of the SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def check_settings(run: RunFolder, config: TrainingConfig) -> None:
    """Refuse a run with other settings. Of images only the file names count, because folders can move.

    Raises:
        UserError: the settings differ.
    """
    saved = run.config(type(config))
    for name in changed_settings(saved, config):
        old, new = getattr(saved, name), getattr(config, name)
        if _file_names(old) is None or _file_names(old) != _file_names(new):
            raise UserError(
                f"{run.path}: this run was made with {name} {old!r}, not {new!r}: choose another --out for the "
                "benchmark, or delete this folder"
            )


def _file_names(value: object) -> list[str] | None:
    """Return the file names of a path or of several; None for anything else."""
    values = value if isinstance(value, list) else [value]
    paths = [item for item in values if isinstance(item, Path)]
    return [path.name for path in paths] if len(paths) == len(values) else None
