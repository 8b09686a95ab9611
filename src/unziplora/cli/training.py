"""Parts that all training commands share: settings in layers, a plan, a run, its result."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import click

from unziplora.cli.command import Keys, Output, Plan, RecipeCommand
from unziplora.cli.options import ExpandedPath
from unziplora.cli.output import memory_advice
from unziplora.config.recipe import refuse_unknown
from unziplora.config.templates import warn_of_ui_syntax
from unziplora.config.training import ImageConfig, TrainingConfig
from unziplora.errors import UserError
from unziplora.jobs.queue import refuse_waiting
from unziplora.jobs.trainings import TRAININGS, foresee, function_of
from unziplora.runs.folder import RunFolder
from unziplora.runs.model_card import folder_argument
from unziplora.utils.files import file_stem, safe_name, write_png
from unziplora.utils.inputs import read_json, read_toml
from unziplora.utils.progress import Callback

RUNS = "unziplora.runs"
"""Entry of a context's `meta`: the folder of the runs, if it is not `runs`."""


def training_command(
    words: str,
    model: type[ImageConfig],
    *,
    help: str,
    short_help: str,
    notes: Mapping[str, list[str]] | None = None,
) -> RecipeCommand:
    """Make the command of a training on images.

    Args:
        words: the command's words after `unziplora`.
        notes: remarks to show behind a key's help instead of its default.
    """
    own = {"images": ["repeatable", "the same as IMAGE"], "out": ["default: runs/NAME"]}
    return RecipeCommand(
        words.split()[-1],
        model,
        train,
        _plan,
        help=help,
        short_help=short_help,
        dry_run="estimate memory; draw what is learned",
        arguments=[click.Argument(["image"], nargs=-1, type=ExpandedPath())],
        layers=partial(_layers, model, words),
        resumable=True,
        notes={**own, **(notes or {})},
    )


def _layers(model: type[ImageConfig], words: str, params: Mapping[str, Any], file: Keys, flags: Keys) -> list[Keys]:
    """Combine the run to resume, the TOML file, the flags and the images named first."""
    flag = _flag(params["resume"], params["extend"])
    for path in params["image"]:
        if flag and RunFolder(Path(path)).config_file.is_file():
            raise UserError(
                f"{path} is a run, not an image: unziplora {words} {flag} --out {folder_argument(Path(path))}"
            )
    if params["image"]:
        flags["images"] = [*params["image"], *flags.get("images", [])]
    images = flags.get("images") or file.get("images")
    if not images and not (params["resume"] or params["extend"]):
        refuse_unknown(file, model.model_fields)  # `image` instead of `images`, for example
        raise UserError(f"no image to learn from: unziplora {words} IMAGE …; see unziplora {words} --help")
    first = images[0] if images and isinstance(images, list) else images
    name = file_stem(Path(first)) if isinstance(first, str | Path) else None
    return run_layers(model, words, file, flags, name, params["resume"], params["extend"])


def train(config: TrainingConfig, progress: Callback, resume: bool) -> Output:
    """Train as configured, and list the files of the run."""
    if not resume:
        refuse_waiting(config.out)
    with memory_advice(config):
        return _output(function_of(config)(config, resume=resume, progress=progress))


def _plan(config: ImageConfig, resume: bool) -> Plan:
    """List the prompts, estimate the memory, and write what will be learned as an image next to the run folder."""
    from unziplora.images.preprocess import warn_of_flaws

    warn_if_refused(config, resume)
    image, size, prompts, memory, flaws, _ = foresee(config)
    warn_of_ui_syntax(prompts.values())
    warn_of_flaws(flaws)
    file = config.out.parent / f"{config.out.name or 'run'}-learned.png"
    write_png(file, image)
    data = {"prompts": prompts, "memory": memory.model_dump(mode="json"), "image": str(file)}
    shown = "What will be learned, {}×{} pixels: {}".format(*size, file)
    return Plan(config, data, [*prompt_lines(prompts), "", shown, "", *memory.table().splitlines()])


def warn_if_refused(config: TrainingConfig, resume: bool) -> None:
    """Warn that a run would be refused: its folder contains something, or it was begun with other settings."""
    run = RunFolder(config.out)
    try:
        if resume:
            run.check_extendable(config)
            run.check_settings(config)
        else:
            run.check_free()
    except UserError as error:
        warnings.warn(f"without --dry-run this is refused: {error}", stacklevel=2)


def prompt_lines(prompts: Mapping[str, str]) -> list[str]:
    """List prompts under a heading."""
    return ["Prompts", *(f"{name}: {text}" for name, text in prompts.items())]


def run_layers(
    model: type[TrainingConfig],
    words: str,
    file: Keys,
    flags: Keys,
    name: str | None,
    resume: bool,
    extend: int | None = None,
) -> list[Keys]:
    """Combine the run to resume or to extend, the TOML file and the flags, and choose a run folder.

    Args:
        words: the command's words after `unziplora`.
        name: name of the run's folder in the folder of the runs, unless `out` is set; None if nothing to name it after
            is known.

    Raises:
        UserError: there is no run to resume, or no finished one to extend.
    """
    context = click.get_current_context(silent=True)
    runs = context.meta.get(RUNS, Path("runs")) if context else Path("runs")
    named = None if name is None else str(runs / safe_name(name, "image"))
    out = flags.get("out") or file.get("out") or named
    if extend and (resume or "steps" in flags):
        raise UserError("--extend says how many more steps: leave --resume and --steps out")
    flag = _flag(resume, extend)
    if not flag:
        return [file, flags, {"out": out} if out else {}]
    if not out:
        raise UserError(f"{flag} needs the run folder: unziplora {words} {flag} --out runs/NAME")
    run = RunFolder(Path(str(out)).expanduser())
    _refuse_other_training(run, model, flag)
    if extend:
        others = {name: value for name, value in file.items() if name != "steps"}
        return [run.settings_to_extend(model, extend), others, flags, {"out": out}]
    return [run.settings(model), file, flags, {"out": out}]


def _flag(resume: bool, extend: int | None) -> str:
    """Return the flag that continues a run, with its value; empty for a new run."""
    return f"--extend {extend}" if extend else "--resume" if resume else ""


def _refuse_other_training(run: RunFolder, model: type[TrainingConfig], flag: str) -> None:
    """Refuse to continue the run of another command; a folder without a readable run is left to its reader."""
    settings = read_toml(run.config_file) if run.config_file.is_file() else {}
    if settings.keys() <= model.model_fields.keys():
        return
    for name, training in TRAININGS.items():
        if settings.keys() <= training.recipe.model_fields.keys():
            words = name if name in ("split", "zip") else f"train {name}"
            place = folder_argument(run.path)
            raise UserError(f"{run.path}: another command made this run: unziplora {words} {flag} --out {place}")


def _output(run: RunFolder) -> Output:
    """List the files of a finished run."""
    loras = {name: str(path) for name, path in run.loras.items()}
    samples = [str(path) for path in run.sheets]
    check = read_json(run.check_file) if run.check_file.is_file() else {}
    data: dict[str, Any] = {"run": str(run.path), **loras, "samples": samples, "card": str(run.card)}
    lines = [f"{name:<8} {path}" for name, path in loras.items()] + [f"sample   {path}" for path in samples[-1:]]
    lines += [f"check    {line}" for line in check.get("findings", [])]
    data |= {"check": check} if check else {}
    return Output(data, "\n".join(lines), f"How to use it: {run.card}")
