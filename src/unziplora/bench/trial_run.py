"""Run of a trial: forecast, queue of trainings, scores and report after each, and what failed."""

from __future__ import annotations

import shutil
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from unziplora.bench.cost import Metered
from unziplora.bench.run import resumable
from unziplora.bench.trial import Trial, Unit, open_trial
from unziplora.bench.trial_report import SHARED, TrialReport, write_trial
from unziplora.bench.workspace import check_settings
from unziplora.config.recipe import to_toml
from unziplora.config.training import ImageConfig, TrainingConfig
from unziplora.config.trial import TrialConfig
from unziplora.errors import Interrupted, MachineError, UserError, faults_of
from unziplora.jobs.queue import Queue
from unziplora.jobs.state import read_failure, state_of
from unziplora.jobs.trainings import method_of
from unziplora.jobs.worker import POLL, work
from unziplora.models.sizes import inspect_base
from unziplora.runs.folder import RunFolder
from unziplora.training.memory import estimate
from unziplora.training.preflight import check_run
from unziplora.utils.files import atomic_write
from unziplora.utils.progress import Callback, Progress, duration, size

FP16, CHECKPOINT, PIXEL = 2, 3 * 12, 3
"""Bytes of a trained number in a LoRA file; of the same in checkpoints, with two moments in fp32 (three files exist
while one is written); and of a pixel of a PNG file, at most."""


class Forecast(NamedTuple):
    """Forecast of a trial: the work, and what it needs.

    Attributes:
        disk: bytes of the LoRAs and images that are missing, and of the checkpoints of one run.
        free: bytes free on the disk.
        memory: peak bytes of a training, by arm.
        tight: arms whose training does not fit into the memory that is free now.
    """

    images: int
    arms: list[str]
    trainings: int
    samples: int
    disk: int
    free: int
    memory: dict[str, int]
    tight: list[str]

    def lines(self) -> list[str]:
        """Return the forecast for people."""
        most = max(self.memory.values(), default=0)
        return [
            f"images: {self.images}; arms: {', '.join(self.arms)}",
            f"trainings: {self.trainings}; images to sample and score: {self.samples}",
            f"up to about {size(self.disk)} on the disk, where {size(self.free)} are free",
            *([f"up to about {size(most)} of memory for a training"] if most else []),
            "the time is estimated as soon as the first trainings are scored",
        ]


def foresee(trial: Trial) -> Forecast:
    """Forecast disk and memory from the first image, and check what can be checked without loading the base.

    Raises:
        UserError: a setting of an arm cannot be trained.
    """
    config, units, sizes = trial.config, trial.units, inspect_base(trial.config.base)
    first = next(iter(trial.cases)), config.seeds[0]
    loras, largest, tight = dict.fromkeys(trial.arms, 0), 0, dict[str, None]()
    memory: dict[str, int] = {}
    for name in trial.arms:
        for recipe in trial.recipes((name, *first)):
            assert isinstance(recipe, ImageConfig)
            method = method_of(recipe)
            with faults_of(f"arm {name}"):
                shape, layers = check_run(method, recipe).size, method.layers(recipe, sizes.names)
            numbers = sum(sizes.adapter(recipe.rank, paths) for paths in layers.values())
            loras[name] += FP16 * numbers
            largest = max(largest, CHECKPOINT * numbers)
            forecast = estimate(recipe, sizes, layers, shape)
            memory[name] = max(memory.get(name, 0), forecast.total)
            if forecast.fits is False:
                tight[name] = None
    images = {unit: config.samples * _prompts(trial, unit) for unit in units}
    scored = {unit for unit in units if trial.scores_file(unit).is_file()}
    trained = {unit for unit in units if all(run.card.exists() for run in trial.trainings(unit))}
    missing = sum(loras[unit[0]] for unit in units if unit not in trained)
    missing += sum(count * PIXEL * sizes.resolution**2 for unit, count in images.items() if unit not in scored)
    return Forecast(
        images=len(trial.cases),
        arms=list(trial.arms),
        trainings=sum(len(trial.recipes(unit)) for unit in units),
        samples=sum(images.values()),
        disk=missing + (largest if len(trained) < len(units) else 0),
        free=shutil.disk_usage(_existing(config.out)).free,
        memory=memory,
        tight=list(tight),
    )


def _prompts(trial: Trial, unit: Unit) -> int:
    """Return the number of prompts that a unit is sampled with."""
    case = trial.cases[unit[1]]
    return len(case.targets) + len(case.others) + 1


def _existing(path: Path) -> Path:
    """Return the first of a path and its parents that exists."""
    return next(folder for folder in (path.resolve(), *path.resolve().parents) if folder.exists())


@resumable()
def run_trial(
    config: TrialConfig,
    progress: Callback | None = None,
    *,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
) -> TrialReport:
    """Train, sample and score all units; write sheets and report after each, as far as they go.

    Everything that an earlier call finished is reused. Trainings wait in the queue of `out/runs`, so that
    `unziplora worker` on another GPU can take some.

    Arguments and errors are those of `open_trial`, and:

    Raises:
        UserError: `out` contains runs with other settings, or of another base.
        MachineError: trainings failed, after everything else was done; disk full, no permission.
        Interrupted: stopped on request; the same call continues.
    """
    trial = open_trial(config, progress, overrides)
    announce(trial, foresee(trial))
    trial.workspace.claim(trial.base())
    atomic_write(trial.workspace.folder / "trial.toml", to_toml(config))

    def score() -> None:
        before = len(trial.results)
        if trial.score_ready():
            write_trial(trial)
        if len(trial.results) > before:
            tell_time(trial)

    queue = submit(trial)
    score()  # the base without LoRA: faults of the set-up show before the first training
    if trial.faults and not trial.results:
        raise MachineError(f"nothing can be sampled and scored here: {next(iter(trial.faults.values()))}")
    while True:
        if work(queue, Metered(trial.trainer), trial.progress, until_empty=True, after=score).stopped:
            raise Interrupted
        score()
        if not any(state_of(job.run) == "running" for job in queue.jobs()):
            break
        time.sleep(POLL)  # another worker trains the last ones
    report = write_trial(trial)
    check_complete(trial)
    return report


def announce(trial: Trial, forecast: Forecast) -> None:
    """Report a forecast, and warn of what does not fit."""
    for line in forecast.lines():
        trial.progress(Progress(message=line))
    if forecast.disk > forecast.free:
        warnings.warn(
            f"the disk of --out may become full: {size(forecast.disk)} are needed and {size(forecast.free)} are free",
            stacklevel=2,
        )
    if forecast.tight:
        warnings.warn(f"memory may not suffice for {', '.join(forecast.tight)}; close other programs", stacklevel=2)


def tell_time(trial: Trial) -> None:
    """Report how much is scored, and about how long the rest takes."""
    left, units = trial.seconds_left(), trial.units
    rest = f", about {duration(left)} left" if left else ""
    trial.progress(Progress(message=f"{len(trial.results)} of {len(units)} results{rest}"))


def submit(trial: Trial) -> Queue:
    """Make the trial's queue that of its present settings: what is missing, in order; failed trainings are tried again.

    Runs that have learned nothing are made anew, because settings may have changed since.

    Raises:
        UserError: runs have learned with other settings.
    """
    queue = Queue(trial.workspace.runs)
    trial.workspace.runs.mkdir(parents=True, exist_ok=True)
    recipes = [recipe for unit in trial.units for recipe in trial.recipes(unit)]
    refuse_other_settings(recipes)
    for job in queue.jobs():
        if job.state != "running":
            queue.cancel(job.number)
    running = {job.run.path for job in queue.jobs()}
    for recipe in recipes:
        run = RunFolder(recipe.out)
        if run.card.exists() or run.path in running:
            continue
        if run.steps():
            queue.add(run.path)
        else:
            if run.config_file.is_file():
                shutil.rmtree(run.path, ignore_errors=True)  # settings, and at most a failure with its log
            queue.submit(recipe)
    return queue


def refuse_other_settings(recipes: Sequence[TrainingConfig]) -> None:
    """Check that runs which have learned something have the settings of their recipes.

    Raises:
        UserError: some have not; the message names all of them.
    """
    faults = []
    for recipe in recipes:
        run = RunFolder(recipe.out)
        if run.config_file.is_file() and (run.card.exists() or run.steps()):
            try:
                check_settings(run, recipe)
            except UserError as error:
                faults.append(str(error))
    if faults:
        raise UserError("\n".join(faults))


def check_complete(trial: Trial) -> None:
    """Raise an error if a training failed or was canceled, or a result could not be sampled.

    Raises:
        MachineError: the first reason, and where the report is.
    """
    reasons = [
        f"{run.path}: {failure.message if (failure := read_failure(run)) else 'canceled'}"
        for unit in trial.units
        if unit not in trial.results
        for run in trial.trainings(unit)
        if not run.card.exists()
    ]
    reasons += [f"{name}, {slug}, seed {seed}: {reason}" for (name, slug, seed), reason in trial.faults.items()]
    if reasons:
        raise MachineError(
            f"{len(reasons)} of the trial's trainings and results failed, the first because of\n  {reasons[0]}\n"
            f"The report {trial.config.out / 'report.md'} contains the others, and {trial.config.out / SHARED} can be "
            "sent as it is; the same command tries these again"
        )
