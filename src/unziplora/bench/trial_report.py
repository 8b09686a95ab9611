"""Report of a trial: figures and contact sheets for its user, and one file to send, without names, words and images."""

from __future__ import annotations

import json
import platform
import zipfile
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any, BinaryIO

import torch
from PIL import Image, ImageOps
from pydantic import BaseModel

from unziplora.bench.cost import read_cost
from unziplora.bench.report import Row, first_images, image_means, markdown_table
from unziplora.bench.scores import Figures, mean_figures
from unziplora.bench.trial import FEWEST, Trial, Unit
from unziplora.bench.workspace import WEIGHTS
from unziplora.config.bases import SDXL
from unziplora.config.training import TrainingConfig
from unziplora.images.sheet import sheet
from unziplora.jobs.trainings import TRAININGS
from unziplora.lora.blocks import BLOCK_MAPS
from unziplora.metrics.csls import NEIGHBORS
from unziplora.models.device import pick_device, pick_dtype
from unziplora.utils.files import atomic_write, write_png
from unziplora.utils.progress import duration, size
from unziplora.utils.text import table

SHARED = "report.zip"
"""Name of the file to send."""

CELL = 256
"""Side of an image on a contact sheet, in pixels."""

COLUMNS = {
    ("dino-clip", "style.style"): "style CLIP-I",
    ("csd", "style.style"): "style CSD",
    ("csls", "style.style"): "style CSLS",
    ("dino-clip", "style.content"): "style DINO",
    ("dino-clip", "content.content"): "content DINO",
    ("csd", "content.content"): "content CSD",
    ("csls", "content.content"): "content CSLS",
}
"""Titles of the figures by kind of measure, task and quantity."""

LEGEND = """Every figure compares generated images with the image that was learned; ± is over training seeds.

- style CLIP-I, CSD, CSLS: the style alone, on other things; higher: more of the style. A copy of the image is the
  highest.
- style DINO: the same images; higher: the thing came along. content CSD, CSLS: the content alone, in other styles;
  higher: the style came along.
- content DINO: the content alone, in other styles; higher: more of this thing.
"""


class ArmReport(BaseModel):
    """One arm: settings of its trainings, results, and cost of one image.

    Attributes:
        scored: results of how many.
        minutes: of training, mean over images and seeds; None if another worker trained.
        sampling_minutes: the same of sampling.
        memory: peak bytes of a training.
    """

    name: str
    trainings: list[dict[str, Any]]
    scored: int
    planned: int
    minutes: float | None
    sampling_minutes: float | None
    memory: int | None


class TrialReport(BaseModel):
    """All that is sent: nothing in it names a file, a person or a word of an image.

    Attributes:
        models: type and hash of each model that measured.
        reference: images whose likeness counts as usual in CSLS; None: no such figures.
        scores: figures of every image, by its number in words.toml, arm and seed.
    """

    versions: dict[str, str]
    device: str
    device_memory: int | None
    precision: str
    base: str
    base_fingerprint: str
    models: dict[str, str]
    images: int
    seeds: list[int]
    samples: int
    sample_steps: int
    guidance: float
    reference: str | None
    arms: list[ArmReport]
    scores: list[dict[str, Any]]
    words: list[dict[str, str]] | None = None

    def _mean(self, arm: str, seed: int) -> Figures:
        return mean_figures(score["figures"] for score in self.scores if (score["arm"], score["seed"]) == (arm, seed))

    @property
    def titles(self) -> list[str]:
        """Titles of the figures that there are."""
        return [title for title in COLUMNS.values() if any(title in score["figures"] for score in self.scores)]

    def table(self) -> str:
        """Format the means over images as a Markdown table."""
        rows = [
            Row(method=arm.name, measure="", cases={}, seeds={seed: self._mean(arm.name, seed) for seed in self.seeds})
            for arm in self.arms
        ]
        return markdown_table(rows, {title: title for title in self.titles})


def make_report(trial: Trial) -> TrialReport:
    """Collect all results of a trial so far."""
    config, device, others = trial.config, pick_device(), len(trial.cases) - 1
    gpu = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    words = [case.words for case in trial.cases.values()]
    return TrialReport(
        versions=versions(),
        device=gpu.name if gpu else device.type,
        device_memory=gpu.total_memory if gpu else None,
        precision=str(pick_dtype(config.precision, device)).removeprefix("torch."),
        base=SDXL if config.base == SDXL else "another one",
        base_fingerprint=(trial.workspace.folder / WEIGHTS).read_text(encoding="utf-8").strip(),
        models=trial.fingerprints,
        images=len(trial.cases),
        **config.model_dump(include={"seeds", "samples", "sample_steps", "guidance"}),
        reference=None
        if trial.references is None
        else f"the {min(NEIGHBORS, others)} nearest of the {others} other images",
        arms=[arm_report(trial, name) for name in trial.arms],
        scores=[score_entry(trial, unit) for unit in trial.units if unit in trial.results],
        words=words if config.share_images else None,
    )


def versions() -> dict[str, str]:
    """Return the versions that may change a result."""
    names = ("unziplora", "torch", "diffusers", "transformers")
    own = {"python": platform.python_version(), "system": platform.system(), "cuda": torch.version.cuda or "none"}
    return {**{name: version(name) for name in names}, **own}


def arm_report(trial: Trial, name: str) -> ArmReport:
    """Describe an arm, and what it costs."""
    units = [unit for unit in trial.units if unit[0] == name]
    scored = [unit for unit in units if unit in trial.results]
    costs = [[read_cost(run) for run in trial.trainings(unit)] for unit in scored]
    whole = [[cost for cost in unit if cost] for unit in costs if unit and all(unit)]
    return ArmReport(
        name=name,
        trainings=[public_settings(recipe) for recipe in trial.recipes(units[0])],
        scored=len(scored),
        planned=len(units),
        minutes=_minutes(sum(cost.seconds for cost in unit) for unit in whole),
        sampling_minutes=_minutes(trial.results[unit]["seconds"]["sampling"] for unit in scored),
        memory=max((cost.memory for unit in whole for cost in unit), default=None),
    )


def _minutes(seconds: Iterable[float]) -> float | None:
    values = list(seconds)
    return round(mean(values) / 60, 2) if values else None


def public_settings(recipe: TrainingConfig) -> dict[str, Any]:
    """Return the settings of a training without places, words and base."""
    hidden = recipe.marked("private") | {"base", "content", "style", "seed", "device", "sample_seeds"}
    blocks = getattr(recipe, "blocks", None)
    named = {"blocks": blocks} if blocks in BLOCK_MAPS else {}
    method = next(name for name, training in TRAININGS.items() if training.recipe is type(recipe))
    return {"method": method, **recipe.model_dump(mode="json", exclude=hidden), **named}


def score_entry(trial: Trial, unit: Unit) -> dict[str, Any]:
    """Return the figures of one unit; the image is a number."""
    name, slug, seed = unit
    result = trial.results[unit]
    figures: Figures = {}
    for measure in trial.case_measures(trial.cases[slug]):  # those of an earlier call may be stored too
        means = image_means(result, measure.name)
        kind = measure.name.partition(":")[0]
        figures |= {title: round(means[figure], 5) for (of, figure), title in COLUMNS.items() if of == kind}
    return {"image": list(trial.cases).index(slug) + 1, "arm": name, "seed": seed, "figures": figures}


def format_trial(report: TrialReport) -> str:
    """Format the report as Markdown."""
    card = report.device + (f", {size(report.device_memory)}" if report.device_memory else "")
    seeds = ", ".join(map(str, report.seeds))
    software = ", ".join(f"{name} {number}" for name, number in report.versions.items())
    models = ", ".join(f"{kind.upper()} ({name})" for kind, name in report.models.items())
    scaled = (
        f"CSLS is CSD after local scaling, where a usual likeness is that of {report.reference} of the folder: 0 is "
        "usual."
        if report.reference
        else f"There is no CSLS, which needs a CSD model and at least {FEWEST} images."
    )
    return "\n\n".join(
        [
            "# Trial",
            f"{software}; {card}, {report.precision}.",
            f"Base: {report.base} ({report.base_fingerprint}). Measured by {models}.",
            f"Images: {report.images}; training seeds: {seeds}; samples per prompt: {report.samples}, with "
            f"{report.sample_steps} steps and guidance {report.guidance:g}.",
            "## Means over images",
            report.table(),
            LEGEND + "\n" + scaled,
            "## Cost of one image",
            cost_table(report),
            "## Each image, means over seeds",
            image_table(report),
            "The settings of each arm are in report.json.\n",
        ]
    )


def cost_table(report: TrialReport) -> str:
    """Format results, minutes and memory of each arm as a Markdown table."""

    def minutes(value: float | None) -> str:
        return "–" if value is None else duration(60 * value)

    head = ("arm", "results", "training", "sampling", "peak memory of a training")
    rows = [
        (
            arm.name,
            f"{arm.scored} of {arm.planned}",
            minutes(arm.minutes),
            minutes(arm.sampling_minutes),
            size(arm.memory) if arm.memory else "–",
        )
        for arm in report.arms
    ]
    return table(head, rows)


def image_table(report: TrialReport) -> str:
    """Format the figures of every image and arm as a Markdown table."""
    rows = []
    for number in range(1, report.images + 1):
        for arm in report.arms:
            own = [score["figures"] for score in report.scores if (score["image"], score["arm"]) == (number, arm.name)]
            means = mean_figures(own)
            if means:
                rows.append((str(number), arm.name, *(f"{means[title]:.3f}" for title in report.titles)))
    return table(("image", "arm", *report.titles), rows)


def write_trial(trial: Trial) -> TrialReport:
    """Write report.json, report.md, the contact sheets and the file to send.

    Raises:
        MachineError: disk full, no permission.
    """
    report, folder = make_report(trial), trial.workspace.folder
    files = {"report.json": report.model_dump_json(indent=1) + "\n", "report.md": format_trial(report)}
    for name, text in files.items():
        atomic_write(folder / name, text)
    sheets = write_sheets(trial, folder / "sheets")

    def pack(file: BinaryIO) -> None:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, text in files.items():
                archive.writestr(name, text)
            for path in sheets if trial.config.share_images else ():
                archive.write(path, f"sheets/{path.name}")

    atomic_write(folder / SHARED, pack)
    return report


def write_sheets(trial: Trial, folder: Path) -> list[Path]:
    """Write a contact sheet of each image that has results, again if there are more of them; return the files."""
    paths = []
    for number, slug in enumerate(trial.cases, 1):
        units: dict[str, Unit] = {}
        for unit in trial.results:
            if unit[1] == slug:
                units.setdefault(unit[0], unit)
        if not units:
            continue
        path, shown = folder / f"image-{number}.png", folder / f".image-{number}.json"
        state = json.dumps([(unit, trial.results[unit]["settings"]) for unit in units.values()])
        if not (path.is_file() and shown.is_file() and shown.read_text(encoding="utf-8") == state):
            write_png(path, contact_sheet(trial, units))
            atomic_write(shown, state)
        paths.append(path)
    return paths


def contact_sheet(trial: Trial, units: Mapping[str, Unit]) -> Image.Image:
    """Lay out the first image of each task, one row per arm; columns: input, content alone, style alone, both."""
    rows, columns = [], ["input"]
    for name in (name for name in trial.arms if name in units):
        _, slug, seed = units[name]
        case, first = trial.cases[slug], first_images(trial.results[units[name]])
        run = trial.workspace.run_folder(name, case, seed)
        columns = ["input", *("both" if task == "both" else target for task, target in first)]
        rows.append([_cell(case.image), *(_open(run / file) for file in first.values())])
    return sheet(rows, [name for name in trial.arms if name in units], columns)


def _open(path: Path) -> Image.Image | None:
    if not path.is_file():  # scores count without their images
        return None
    with Image.open(path) as image:
        return _cell(image)


def _cell(image: Image.Image) -> Image.Image:
    return ImageOps.contain(image.convert("RGB"), (CELL, CELL))
