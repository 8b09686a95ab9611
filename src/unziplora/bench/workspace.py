"""Where the benchmark keeps pictures and runs: each training is done once, continued if it was interrupted."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from unziplora.bench.cases import Case, Example
from unziplora.config.bench import BenchConfig
from unziplora.config.training import TrainingConfig
from unziplora.errors import UserError
from unziplora.models.base import Base
from unziplora.runs.folder import RunFolder, differing
from unziplora.utils.files import atomic_write, write_png
from unziplora.utils.progress import Callback

WEIGHTS = "weights.txt"
"""Holds the fingerprint of the base's weights."""

PATHS = {"out", "images", "masks", "content_lora", "style_lora", "content_images", "style_images"}
"""Keys of recipes that say where something lies, and nothing of what is learned."""

C = TypeVar("C", bound=TrainingConfig, contravariant=True)


class TrainFunction(Protocol[C]):
    """A training as a function, such as `split`."""

    def __call__(self, config: C, resume: bool = False, progress: Callback | None = None) -> RunFolder:
        """Train as configured."""


@dataclass(frozen=True)
class Workspace:
    """The folder of a benchmark.

    Attributes:
        config: the benchmark's recipe.
        folder: absolute.
        overrides: settings by method; those of a method with several trainings in a table for each.
        homes: folders of methods whose runs are kept in another benchmark's.
    """

    config: BenchConfig
    folder: Path
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    homes: Mapping[str, Path] = field(default_factory=dict)

    def claim(self, base: Base) -> None:
        """Note the base's weights; what is here by other weights would be taken for theirs.

        Raises:
            UserError: the folder's runs and scores are of other weights of that name.
        """
        path, mine = self.folder / WEIGHTS, base.fingerprint()
        if not path.is_file():
            atomic_write(path, mine + "\n")
        elif (found := path.read_text(encoding="utf-8").strip()) != mine:
            raise UserError(
                f"{self.folder}: measured with other weights of base {self.config.base!r} ({found}; these are {mine}): "
                "choose another --out, or the version of the base that it was measured with"
            )

    def run_folder(self, method: str, case: Case, seed: int) -> Path:
        """Where one method's trainings on a case are kept."""
        return self.homes.get(method, self.folder) / "runs" / method / case.slug / f"seed-{seed}"

    def settings(self, method: str, training: str | None = None) -> dict[str, Any]:
        """The overrides of a method, or of one of its trainings."""
        given = self.overrides.get(method, {})
        return dict(given if training is None else given.get(training, {}))

    def common(self, case: Case, seed: int) -> dict[str, Any]:
        """Keys of all trainings on a case."""
        config = self.config
        return {
            "images": self.pictures(case, "input", [Example(case.content, (case.picture,))]),
            "base": config.base,
            "token": config.token,
            "seed": seed,
            "precision": config.precision,
            "device": config.device,
            "sample_seeds": [],
        }

    def pictures(self, case: Case, name: str, examples: Sequence[Example]) -> list[Path]:
        """Pictures of a case as files that trainings can read, written once; a file's name tells what is in it."""
        paths = []
        for number, picture in enumerate(picture for example in examples for picture in example.pictures):
            mark = hashlib.sha256(picture.tobytes()).hexdigest()[:8]
            path = self.folder / "cases" / case.slug / f"{name}-{number}-{mark}.png"
            if not path.is_file():
                write_png(path, picture)
            paths.append(path)
        return paths

    def finish(self, job: TrainFunction[C], config: C) -> RunFolder:
        """The run of a recipe: as it is if it is finished, else trained, from its last checkpoint if there is one.

        Raises:
            UserError: a run with other settings is there already; or as the training.
            MachineError, Interrupted: as the training.
        """
        run = RunFolder(config.out)
        if run.config_file.is_file() and (run.card.exists() or run.latest()):
            _check_same(run, config)
        if run.card.exists():
            return run
        return job(config, run.latest() is not None)


def plain(recipe: TrainingConfig) -> dict[str, Any]:
    """What a recipe says of the training, wherever its files lie and whatever it is computed on.

    Stored results count as the same: keys that were renamed since, or lost their effect, keep their names and values.
    """
    settings = recipe.model_dump(mode="json", exclude=PATHS | {"device", "cuda_graphs"})
    settings["sample_steps"] = settings.pop("generated_steps")
    settings["sample_guidance"] = settings.pop("generated_guidance")
    if "official_code" in settings:
        official = settings.pop("official_code")
        settings |= {"column_score": "threshold" if official else "importance", "score_scaled": official}
        settings |= {"column_choice": "strict" if official else "exact", "scale_gradient": "overlap"}
        settings |= {"init": "gaussian" if official else "zeros", "decay_masked": official}
    return settings


def fingerprint(told: Any) -> str:
    """Sixteen digits that differ where this differs, which is of what JSON can hold."""
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def _check_same(run: RunFolder, config: TrainingConfig) -> None:
    """Refuse a run that was made with other settings; where its pictures lie does not matter, only their names."""
    saved = run.config(type(config))
    for name in differing(saved, config):
        old, new = getattr(saved, name), getattr(config, name)
        if _names(old) is None or _names(old) != _names(new):
            raise UserError(
                f"{run.path}: this run was made with {name} {old!r}, not {new!r}: choose another --out for the "
                "benchmark, or delete this folder"
            )


def _names(value: object) -> list[str] | None:
    """The file names of a path or of several; None of anything else."""
    values = value if isinstance(value, list) else [value]
    paths = [item for item in values if isinstance(item, Path)]
    return [path.name for path in paths] if len(paths) == len(values) else None
