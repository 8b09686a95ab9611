"""`unziplora trial`: methods and settings compared on a user's images and GPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click

from unziplora.cli.command import Keys, Output, Plan, RecipeCommand
from unziplora.cli.options import ExpandedPath
from unziplora.config.trial import TrialConfig
from unziplora.errors import UserError
from unziplora.utils.progress import Callback


def _layers(params: Mapping[str, Any], file: Keys, flags: Keys) -> list[Keys]:
    """Combine the TOML file, the flags and the folder named first."""
    if params["folder"]:
        flags["pictures"] = params["folder"]
    if not (flags.get("pictures") or file.get("pictures")):
        raise UserError("no folder of images: unziplora trial FOLDER …; see unziplora trial --help")
    return [file, flags]


def _run(config: TrialConfig, progress: Callback) -> Output:
    from unziplora.bench.trial_report import SHARED
    from unziplora.bench.trial_run import run_trial

    report = run_trial(config, progress)
    contents = "sheets and words too" if config.share_images else "no image, word, name or path is in it"
    files = {"report": config.out / "report.md", "sheets": config.out / "sheets", "to send": config.out / SHARED}
    lines = [f"{name:<8} {path}" for name, path in files.items()]
    return Output(
        report.model_dump(mode="json"), "\n".join([report.table(), "", *lines]), f"{files['to send']}: {contents}"
    )


def _plan(config: TrialConfig) -> Plan:
    """Check everything, and forecast disk and memory; no weights of the base are read."""
    from unziplora.bench.trial import open_trial
    from unziplora.bench.trial_run import foresee

    with TemporaryDirectory() as folder:
        forecast = foresee(open_trial(config, folder=Path(folder)))
    return Plan(config, forecast._asdict(), ["Plan", *forecast.lines()])


trial_command = RecipeCommand(
    "trial",
    TrialConfig,
    _run,
    _plan,
    help="""Compare methods and settings on your images, with SDXL on your GPU, overnight.

    FOLDER contains images, and words.toml with their words. Each arm of --arms learns each image with each of
    --seeds. The content alone in other styles and the style alone on other things are compared with the image, by
    CLIP-I, DINO and CSD.

    \b
      unziplora trial photos --base models/sdxl --clip models/clip --dino models/dino --csd models/csd --dry-run
      unziplora trial photos --base models/sdxl --clip models/clip --dino models/dino --csd models/csd

    Writes report.md, contact sheets, and report.zip to share: figures, settings and versions, without
    images, words, names and paths. The same command continues after an interruption. The trainings are runs in
    OUT/runs: see unziplora runs --runs OUT/runs. On another GPU CUDA_VISIBLE_DEVICES=1 unziplora worker --runs OUT/runs
    helps.
    """,
    short_help="Compare methods on your images and GPU.",
    dry_run="check everything, and forecast disk and memory",
    arguments=[click.Argument(["folder"], required=False, type=ExpandedPath())],
    layers=_layers,
    notes={"pictures": ["the same as FOLDER"]},
)
