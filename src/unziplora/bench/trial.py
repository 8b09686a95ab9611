"""Trial of methods on a user's images: trainings wait in a queue, finished ones are sampled and scored."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from unziplora.bench.cases import Case
from unziplora.bench.contenders import BLoraHalves, Contender, DreamBoothPair, Paper, Split, Untrained
from unziplora.bench.cost import read_cost
from unziplora.bench.evaluate import SCORES, evaluate
from unziplora.bench.photos import EXAMPLE, WORDS, ModelMeasure, load_photos, photo_measures
from unziplora.bench.workspace import Workspace, json_hash
from unziplora.config.recipe import KINDS
from unziplora.config.training import TrainingConfig
from unziplora.config.trial import TrialConfig, split_settings
from unziplora.errors import Interrupted, UserError, disk_full, first_line
from unziplora.jobs.state import state_of
from unziplora.jobs.trainings import Trainer
from unziplora.metrics.csls import csls
from unziplora.models.base import Base
from unziplora.models.device import computing_on, pick_device
from unziplora.models.kept import free_memory
from unziplora.models.sizes import inspect_base
from unziplora.runs.folder import RunFolder, with_absolute_paths
from unziplora.utils.files import image_files
from unziplora.utils.progress import Callback, Progress

FEWEST = 4
"""Images that local scaling needs: with fewer, the others do not show which likeness is usual."""

Unit = tuple[str, str, int]
"""Arm, slug of an image, training seed."""

ARMS: dict[str, Contender] = {
    arm.name: arm
    for arm in (
        Untrained("base"),
        *(
            Split(name, split_settings(name), name)
            for name in ("default", "default-x3", "default-x10", "additions", "convolutions")
        ),
        Paper("paper"),
        BLoraHalves("blora"),
        DreamBoothPair("dreambooth"),
    )
}


@dataclass(frozen=True)
class TrialWorkspace(Workspace):
    """Folder of a trial. All run folders lie in `runs/IMAGE`, where a queue and `unziplora runs` find them."""

    def run_folder(self, method: str, case: Case, seed: int) -> Path:
        """Return the folder of the images and scores of one arm."""
        return self.folder / "results" / case.slug / f"{method}-{seed}"

    def training_folder(self, method: str, case: Case, seed: int, training: str) -> Path:
        """Return the run folder of one of an arm's trainings; DreamBooth has two."""
        return self.runs / case.slug / f"{method}-{seed}{f'-{training}' if training in KINDS else ''}"

    @property
    def runs(self) -> Path:
        """Folder of the run folders and their queue."""
        return self.folder / "runs"


@dataclass
class LocalScaling(ModelMeasure):
    """Likeness by the same models after local scaling.

    Attributes:
        reference: style embeddings of the other images, [R, D].
        mark: hash of these images.
    """

    reference: Tensor
    mark: str

    @property
    def weights_hash(self) -> str:
        return json_hash([super().weights_hash, self.mark])

    def compare(self, features: Tensor, truths: Tensor) -> list[float]:
        """Return the mean over truths [M, D] of the scaled likeness of each image [N, D]."""
        return [float(value) for value in csls(features, truths, self.reference).mean(1)]


@dataclass
class Trial:
    """Trial with its images, arms and models loaded; the base comes with the first use.

    Attributes:
        cases: images by slug, in the order of words.toml.
        references: style embeddings of all images, [N, D]; None if there are too few, or no CSD model.
        results: contents of scores.json by unit, as far as it is scored.
        faults: units that could not be sampled, and why.
    """

    config: TrialConfig
    workspace: TrialWorkspace
    cases: dict[str, Case]
    arms: dict[str, Contender]
    measures: list[ModelMeasure]
    progress: Callback
    references: Tensor | None = None
    trainer: Trainer = field(default_factory=Trainer)
    results: dict[Unit, dict[str, Any]] = field(default_factory=dict)
    faults: dict[Unit, str] = field(default_factory=dict)
    resolved: dict[Unit, list[TrainingConfig]] = field(default_factory=dict)

    @cached_property
    def digests(self) -> dict[str, str]:
        """Hashes of the images by slug."""
        return {slug: hashlib.sha256(case.image.tobytes()).hexdigest() for slug, case in self.cases.items()}

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """Types and hashes of the models that measure, by kind."""
        models = {model.kind: model for measure in self.measures for model in (measure.contents, measure.styles)}
        return {kind: model.fingerprint() for kind, model in models.items()}

    @property
    def units(self) -> list[Unit]:
        """All units: seed by seed and image by image, so that early results are comparable."""
        seeds = self.config.seeds
        return [
            (name, slug, seed)
            for seed in seeds
            for slug in self.cases
            for name, arm in self.arms.items()
            if arm.seeded or seed == seeds[0]
        ]

    def recipes(self, unit: Unit) -> list[TrainingConfig]:
        """Return the recipes of a unit's trainings; each is resolved once, which takes milliseconds."""
        if unit not in self.resolved:
            name, slug, seed = unit
            self.resolved[unit] = self.arms[name].recipes(self.workspace, self.cases[slug], seed)
        return self.resolved[unit]

    def trainings(self, unit: Unit) -> list[RunFolder]:
        """Return the run folders of a unit's trainings."""
        return [RunFolder(recipe.out) for recipe in self.recipes(unit)]

    def scores_file(self, unit: Unit) -> Path:
        """Return the file that a unit's scores are in, once there are any."""
        name, slug, seed = unit
        return self.workspace.run_folder(name, self.cases[slug], seed) / SCORES

    def base(self) -> Base:
        """Return the base, which stays loaded between trainings and samples."""
        keys = self.workspace.config.model_dump(include={"base", "precision", "device"})
        # The path is absolute in run folders too; another spelling would load the base again for each training.
        recipe = with_absolute_paths(TrainingConfig(out=self.workspace.folder, **keys))
        base = self.trainer.load(recipe, self.progress)
        assert base is not None  # only sums of LoRAs need none
        return base

    def case_measures(self, case: Case) -> list[ModelMeasure]:
        """Return the measures of an image: cosines, and local scaling among the others."""
        if self.references is None:
            return self.measures
        numbers = {digest: number for number, digest in enumerate(self.digests.values())}  # each image once
        del numbers[self.digests[case.slug]]
        reference, mark = self.references[list(numbers.values())], json_hash(list(numbers))
        csd = self.measures[-1]
        return [*self.measures, LocalScaling(f"csls: {self.config.csd}", csd.contents, csd.styles, reference, mark)]

    def score_ready(self) -> bool:
        """Sample and score the units whose trainings are finished; return True if there were any."""
        tried = self.results.keys() | self.faults.keys()
        ready = [
            unit for unit in self.units if unit not in tried and all(run.card.exists() for run in self.trainings(unit))
        ]
        if not ready:
            return False
        for unit in ready:
            self.score(unit)
        return True

    def score(self, unit: Unit) -> None:
        """Sample and score a unit; a fault is recorded and stops nothing else, unless the disk is full."""
        name, slug, seed = unit
        case = self.cases[slug]
        try:
            base = self.base()
            with computing_on(base.device):
                self.results[unit] = evaluate(
                    self.workspace, base, self.case_measures(case), self.arms[name], self.cases, case, seed
                )
        except Interrupted:
            raise
        except Exception as error:
            if disk_full(error):
                raise
            self.faults[unit] = first_line(error)
            self.progress(Progress(message=f"{name}, {slug}, seed {seed}: no result: {self.faults[unit]}"))
            free_memory(error)
        for run in self.trainings(unit):
            run.drop_checkpoints(keep=0)  # nobody extends these runs, and a checkpoint of SDXL has gigabytes

    def seconds_left(self) -> float | None:
        """Estimate the seconds to the end from the units scored so far; None before the first training."""
        spent: dict[str, list[float]] = {}
        for unit, result in self.results.items():
            costs = [read_cost(run) for run in self.trainings(unit)]
            if all(cost is not None for cost in costs):
                seconds = sum(cost.seconds for cost in costs if cost) + result["seconds"]["sampling"]
                spent.setdefault(unit[0], []).append(seconds)
        means = {name: sum(values) / len(values) for name, values in spent.items()}
        trained = [mean for name, mean in means.items() if self.arms[name].seeded]
        if not trained:
            return None
        usual = sum(trained) / len(trained)
        return sum(means.get(unit[0], usual) for unit in self.units if unit not in self.results and self.is_open(unit))

    def is_open(self, unit: Unit) -> bool:
        """Return True unless a training of a unit failed, or its images could not be sampled."""
        return unit not in self.faults and all(state_of(run) != "failed" for run in self.trainings(unit))


def open_trial(
    config: TrialConfig,
    progress: Callback | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    folder: Path | None = None,
) -> Trial:
    """Load images and measures, and check the base and the settings of every arm.

    Args:
        overrides: further settings by arm, as in `Workspace`.
        folder: used instead of `config.out`.

    Raises:
        UserError: an image, a word, the base, a model or a setting is not usable.
    """
    if config.out.exists() and not config.out.is_dir():
        raise UserError(f"--out {config.out} is a file; name a folder for runs, scores and report")
    resolution = inspect_base(config.base).resolution
    cases = load_images(config.pictures, resolution)
    settings = config.benchmark()
    if pick_device(settings.device).type == "cpu":
        warnings.warn("no GPU: a trial of SDXL needs one, and hardly ends on a CPU", stacklevel=2)
    measures = photo_measures(settings)
    workspace = TrialWorkspace(settings, (folder or config.out).resolve(), overrides or {})
    arms: dict[str, Contender] = {name: ARMS[name] for name in config.arms}
    trial = Trial(config, workspace, cases, arms, measures, progress or (lambda _: None))
    different = len(set(trial.digests.values()))
    if config.csd and different >= FEWEST:
        trial.references = measures[-1].style([case.image for case in cases.values()])
    elif config.csd:
        warnings.warn(f"no CSLS read-out of CSD: it needs {FEWEST} images, and there are {different}", stacklevel=2)
    return trial


def load_images(folder: Path, side: int) -> dict[str, Case]:
    """Load the images of a folder as `load_photos` does; warn of those that have no words.

    Raises:
        UserError: there is no such folder, no image in it, no words.toml; or as `load_photos`.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name one with images and {WORDS}")
    files = [file.name for file in image_files(folder)]
    if not files:
        raise UserError(f"{folder}: contains no images; put some there, and {WORDS} with their words")
    if not (folder / WORDS).is_file():
        raise UserError(f"{folder / WORDS}: no such file; write the words of each image there: {EXAMPLE}")
    cases = load_photos(folder, side)
    if without := [name for name in files if Path(name).stem not in cases]:
        warnings.warn(f"{folder / WORDS}: no words for {', '.join(without)}, which are left out", stacklevel=2)
    return cases
