"""The published protocol, for real pictures without a truth: what the LoRAs make is compared with the picture itself.

The style alone by CLIP-I and CSD, the content alone by DINO and CSD, as in UnZipLoRA (arXiv 2412.04465, section 4).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from unziplora.bench.cases import Case, Example
from unziplora.bench.report import Report, summarize, table
from unziplora.config.bench import BenchConfig
from unziplora.config.recipe import KINDS, read_toml
from unziplora.errors import UserError
from unziplora.images.preprocess import load_image
from unziplora.metrics.embedders import ImageModel
from unziplora.utils.files import atomic_write

WORDS = "words.toml"
STYLES = ("watercolor painting", "pencil sketch", "oil painting", "neon sign")
THINGS = ("house", "guitar", "rocket", "penguin")
"""What contents are shown in and styles are shown on; the word of the picture itself is left out."""


@dataclass
class ModelMeasure:
    """Two image models as a measure: one for contents, one for styles; its name tells them, so that scores are
    made anew with others."""

    name: str
    contents: ImageModel
    styles: ImageModel

    def content(self, pictures: Sequence[Image.Image]) -> Tensor:
        """[N, D], rows of unit length."""
        return self.contents.embed(pictures)

    concept = content

    def style(self, pictures: Sequence[Image.Image]) -> Tensor:
        """[N, D], rows of unit length."""
        return self.styles.embed(pictures)


def published_cases(folder: Path, side: int) -> dict[str, Case]:
    """Cases from the pictures that `words.toml` in a folder names, each with its words; their truth is the picture.

    Raises:
        UserError: the folder or its words.toml is missing, an entry lacks a word, or a picture cannot be read.
    """
    words_of = read_toml(folder / WORDS)
    if not words_of:
        raise UserError(f"{folder / WORDS}: names no picture: " + _example())
    stems = [Path(name).stem for name in words_of]
    for name in words_of:
        if stems.count(Path(name).stem) > 1:
            raise UserError(f"{folder / WORDS}: two pictures are called {Path(name).stem}: rename one")
    return {stem: _case(folder, name, words, side) for stem, (name, words) in zip(stems, words_of.items(), strict=True)}


def _case(folder: Path, name: str, words: object, side: int) -> Case:
    if not isinstance(words, dict) or set(words) != set(KINDS):
        raise UserError(f"{folder / WORDS}: {name!r} must have the words content and style: " + _example())
    picture = load_image(folder / name, side)
    styles = [style for style in STYLES if style != words["style"]]
    things = [thing for thing in THINGS if thing != words["content"]]
    return Case(
        slug=Path(name).stem,
        content=str(words["content"]),
        style=str(words["style"]),
        new=True,
        drawing=name,
        filter="",
        seed=0,
        tint=(1.0, 1.0, 1.0),
        picture=picture,
        targets=tuple(Example(style, (picture,)) for style in styles),
        others=tuple(Example(thing, (picture,)) for thing in things),
        partner=Path(name).stem,  # mixes of two pictures are not of this protocol
        mix=picture,
        oracle_content=(),
        oracle_style=(),
    )


def _example() -> str:
    return '["cat.jpg"] with content = "cat" and style = "pencil sketch" below it'


def published_measures(config: BenchConfig, device: torch.device | str) -> list[ModelMeasure]:
    """The measures that the named models make: CLIP-I for styles with DINO for contents, and CSD for both.

    Raises:
        UserError: a model cannot be loaded, or one of CLIP and DINO is missing.
    """
    measures = []
    if config.clip and config.dino:
        dino, clip = ImageModel("dino", config.dino, device), ImageModel("clip", config.clip, device)
        measures.append(ModelMeasure(f"dino-clip: {config.dino}, {config.clip}", dino, clip))
    if config.csd:
        csd = ImageModel("csd", config.csd, device)
        measures.append(ModelMeasure(f"csd: {config.csd}", csd, csd))
    return measures


COLUMNS = {
    ("dino-clip", "style.style"): "style CLIP-I",
    ("dino-clip", "content.content"): "content DINO",
    ("csd", "style.style"): "style CSD",
    ("csd", "content.content"): "content CSD",
}


def published_report(config: BenchConfig, results: Sequence[Mapping[str, Any]], measures: Sequence[str]) -> Report:
    """The similarities of a method in one row, whichever measure they come from; means over pictures."""
    found = summarize(config, results, measures)
    rows = [row.model_copy(update={"seeds": {seed: {} for seed in row.seeds}}) for row in found.of(measures[0])]
    for measure in measures:
        titles = {figure: title for (kind, figure), title in COLUMNS.items() if measure.startswith(f"{kind}:")}
        for row, source in zip(rows, found.of(measure), strict=True):
            for seed, figures in source.seeds.items():
                row.seeds[seed].update({title: figures[figure] for figure, title in titles.items()})
    return found.model_copy(update={"rows": rows, "measures": [measures[0]]})


def published_table(report: Report) -> str:
    """The table of the published protocol as Markdown."""
    titles = [title for title in COLUMNS.values() if any(title in f for row in report.rows for f in row.seeds.values())]
    return table(report.rows, {title: title for title in titles})


def write_published_report(report: Report, folder: Path) -> None:
    """Write report.json and report.md.

    Raises:
        MachineError: disk full, no permission.
    """
    config = report.config
    models = ", ".join(f"{name.upper()} {config[name] or '–'}" for name in ("clip", "dino", "csd"))
    text = (
        f"# Published protocol\n\nunziplora {report.version}, base {config['base']}; mean cosine to the picture that "
        f"was learned from, by {models}.\n\n"
    )
    atomic_write(folder / "report.json", report.model_dump_json(indent=1) + "\n")
    atomic_write(
        folder / "report.md", text + published_table(report) + "\n\n± is the standard deviation over training seeds.\n"
    )
