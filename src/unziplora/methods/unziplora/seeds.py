"""The best of several trainings that differ in their seed alone.

Each seed has a run folder of its own inside that of the whole, `seeds/NUMBER/NAME`, so a stopped seed continues from
its checkpoint. In the end the whole folder is that of the best seed, with its settings; the others keep their LoRAs
and samples in theirs.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

from unziplora.config.recipe import to_toml
from unziplora.config.split import SplitConfig
from unziplora.errors import Interrupted, MachineError, NonFiniteLoss
from unziplora.formats.files import read_lora
from unziplora.models.base import Base, open_base
from unziplora.runs.folder import SEEDS, RunFolder, with_absolute_paths
from unziplora.runs.model_card import folder_argument
from unziplora.training.export import write_card
from unziplora.training.method import Method
from unziplora.training.preflight import check_run
from unziplora.training.runner import in_run_folder, named_settings, run_training
from unziplora.utils.files import atomic_write, copy_file, files_below
from unziplora.utils.inputs import read_json
from unziplora.utils.progress import Callback, Progress


def best_of_seeds(
    kind: type[Method[SplitConfig]],
    config: SplitConfig,
    resume: bool = False,
    progress: Callback | None = None,
    base: Base | None = None,
) -> RunFolder:
    """Train with `config.seeds` seeds, from `config.seed` on, and keep the run with the best check.

    Arguments and errors are those of `run_training`.
    """
    report = progress or (lambda _: None)
    with named_settings(config, resume):
        check_run(kind, config, base)

    def work(run: RunFolder) -> None:
        loaded = base or open_base(config.base, config.precision, config.device)
        recipes = {one.seed: one for one in seed_configs(config)}
        trained, diverged = [], None
        for seed, one in recipes.items():
            try:
                trained.append(_train(kind, one, loaded, report, run, config))
            except NonFiniteLoss as error:
                diverged = error
                report(Progress(0, 0, message=f"seed {seed} is left out: {error}"))
        if diverged and not trained:
            raise diverged
        scores = {seed: score for seed, one in recipes.items() if (score := _score(one)) is not None}
        if not scores:
            raise MachineError(f"{run.path / SEEDS}: no seed could be checked; choose the best one by its samples")
        best = max(scores, key=lambda seed: scores[seed])
        chosen = recipes[best]
        _adopt(kind, run, config, best, scores)
        shutil.rmtree(chosen.out.parent, ignore_errors=True)
        for one in recipes.values():
            RunFolder(one.out).drop_checkpoints(keep=0)
        report(Progress(0, 0, message=f"seed {best} is the best of {len(trained)}"))

    return in_run_folder(config, resume, work)


def seed_configs(config: SplitConfig) -> list[SplitConfig]:
    """Return the recipe of each seed; a run that was renamed still has the folders of its seeds under its old name."""
    whole = RunFolder(config.out)
    recipes = []
    for seed in range(config.seed, config.seed + config.seeds):
        folder = whole.path / SEEDS / str(seed)
        begun = (path for path in folder.glob("[!.]*") if path.is_dir())
        out = next(begun, folder / whole.path.name)
        recipes.append(config.model_copy(update={"seed": seed, "seeds": 1, "out": out}))
    return recipes


def _train(
    kind: type[Method[SplitConfig]],
    config: SplitConfig,
    base: Base,
    report: Callback,
    whole: RunFolder,
    recipe: SplitConfig,
) -> RunFolder:
    """Train one seed to its end, from the step that it has reached; the log of the whole run has its steps too."""
    run, number = RunFolder(config.out), config.seed - recipe.seed
    if run.card.exists():
        return run
    whole.rewind_log(number * config.steps + max(run.steps(), default=0))

    def shifted(event: Progress) -> None:
        trained = event.step - (event.steps - config.steps)  # without the steps of earlier phases
        if event.loss == event.loss and trained > 0:
            seconds = round(event.seconds_per_step, 4)
            whole.log(step=number * config.steps + trained, loss=event.loss, seconds=seconds)
        message = f"seed {config.seed}: {event.message}" if event.message else None
        done, steps = event.step + number * event.steps, event.steps * recipe.seeds
        report(replace(event, step=done, steps=steps, message=message))

    try:
        return run_training(kind, config, run.unfinished and not run.is_free(), shifted, base)
    except Interrupted:
        command = f"unziplora {kind.command} --resume --out {folder_argument(recipe.out)}"
        raise Interrupted(f"stopped in seed {config.seed}, checkpoint saved; continue with:\n  {command}") from None


def _score(config: SplitConfig) -> float | None:
    """Return the score of a seed's check; None if there was none."""
    file = RunFolder(config.out).check_file
    return float(read_json(file)["score"]) if file.is_file() else None


def _adopt(
    kind: type[Method[SplitConfig]], run: RunFolder, recipe: SplitConfig, seed: int, scores: dict[int, float]
) -> None:
    """Make a run what its best seed is: copy the files, then the settings, then the card.

    After a kill in between, the same is done again: all that is read stays until the card is there.

    Raises:
        MachineError: disk full, no permission.
    """
    config = next(one for one in seed_configs(recipe) if one.seed == seed)
    best = RunFolder(config.out)
    run.drop_checkpoints(keep=0)
    for path in files_below(best.path, {"config.toml", "README.md"}):  # these are written anew
        copy_file(best.path / path, run.path / path)
    found = read_json(best.check_file)
    ranked = ", ".join(f"seed {seed} {score:.2f}" for seed, score in sorted(scores.items(), key=lambda item: -item[1]))
    lines = [*found["findings"], f"Best of {len(scores)} by this check: {ranked}."]
    figures = {**found, "findings": lines, "seed": seed, SEEDS: {str(one): score for one, score in scores.items()}}
    atomic_write(run.check_file, json.dumps(figures, indent=1) + "\n")
    settle_seed(run)
    loras = {name: read_lora(file) for name, file in run.loras.items()}
    write_card(run, config.model_copy(update={"out": recipe.out}), kind.describe(config), loras, lines)


def settle_seed(run: RunFolder) -> None:
    """Make the settings of a run of several seeds those of the best one, once that is known.

    Raises:
        MachineError: disk full, no permission.
    """
    best = read_json(run.check_file).get("seed") if run.check_file.is_file() else None
    if best is not None:
        config = run.config(SplitConfig).model_copy(update={"seed": best, "seeds": 1})
        atomic_write(run.config_file, to_toml(with_absolute_paths(config)))
