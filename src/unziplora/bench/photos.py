"""Protocol for photos, which have no truth: compare the results with the photo itself.

The style alone is measured by CLIP-I and CSD, the content alone by DINO and CSD, as in UnZipLoRA (arXiv 2412.04465,
section 4).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from unziplora.bench.cases import Case, Example
from unziplora.bench.report import Report, markdown_table, summarize
from unziplora.config.bench import BenchConfig
from unziplora.config.recipe import KINDS
from unziplora.config.templates import plain_words, same_words
from unziplora.errors import UserError
from unziplora.images.preprocess import Cut, ImageFile, load_images
from unziplora.methods.unziplora.check import CONTENTS, STYLES
from unziplora.metrics.embedders import ImageModel, ModelMeasure
from unziplora.utils.files import atomic_write
from unziplora.utils.inputs import read_toml

WORDS = "words.toml"
EXAMPLE = '["cat.jpg"] with content = "cat" and style = "pencil sketch" below it'


def load_photos(folder: Path, side: int) -> dict[str, Case]:
    """Load the photos that `words.toml` in a folder names, each with its words, as cases by slug.

    The truth of every task is the photo itself.

    Raises:
        UserError: the folder or its words.toml is missing, an entry lacks a word, or an image cannot be read.
    """
    entries = read_toml(folder / WORDS) if (folder / WORDS).exists() or not folder.is_dir() else {}
    if not entries:
        raise UserError(f"{folder / WORDS} has to name each image with its words; add {EXAMPLE}")
    stems = [Path(name).stem for name in entries]
    folded = [stem.casefold() for stem in stems]  # their folders are the same on Windows and macOS
    for stem in stems:
        if folded.count(stem.casefold()) > 1:
            raise UserError(f"{folder / WORDS}: two images are called {stem}; rename one")
    return {
        stem: _read_photo(folder, name, words, side) for stem, (name, words) in zip(stems, entries.items(), strict=True)
    }


def _read_photo(folder: Path, name: str, words: object, side: int) -> Case:
    content, style = _words(f"{folder / WORDS}: {name!r}", words)
    image = _middle_square(folder / name, side)
    return Case(
        slug=Path(name).stem,
        content=content,
        style=style,
        image=image,
        targets=tuple(Example(other, (image,)) for other in STYLES if not same_words(other, style)),
        others=tuple(Example(other, (image,)) for other in CONTENTS if not same_words(other, content)),
        partner=Path(name).stem,  # this protocol does not mix two images
        mix=image,
    )


def _middle_square(file: Path, side: int) -> Image.Image:
    """Load an image as a square, and warn of what that loses."""
    (loaded,) = load_images([ImageFile(file)], [(side, side)])
    for flaw in loaded.flaws:
        cut = f"{flaw.loss}; crop the file if the middle is not what you mean" if isinstance(flaw, Cut) else ""
        warnings.warn(cut or str(flaw), stacklevel=4)
    return loaded.image


def _words(where: str, words: object) -> tuple[str, str]:
    """Return the content and the style of an entry, as trainings read them."""
    if not isinstance(words, dict) or set(words) != set(KINDS) or not all(type(text) is str for text in words.values()):
        raise UserError(f"{where} needs exactly the words content and style, as text; write {EXAMPLE}")
    plain = {}
    for kind in KINDS:
        try:
            plain[kind] = plain_words(words[kind], style=kind == "style")
        except ValueError as error:
            raise UserError(f"{where}: {kind} {error}") from None
    return plain["content"], plain["style"]


def photo_measures(config: BenchConfig) -> list[ModelMeasure]:
    """Load the measures that the configured models make: CLIP-I for style with DINO for content, and CSD for both.

    Raises:
        UserError: a model cannot be loaded.
    """
    measures = []
    if config.clip and config.dino:
        dino, clip = ImageModel("dino", config.dino), ImageModel("clip", config.clip)
        measures.append(ModelMeasure(f"dino-clip: {config.dino}, {config.clip}", dino, clip))
    if config.csd:
        csd = ImageModel("csd", config.csd)
        measures.append(ModelMeasure(f"csd: {config.csd}", csd, csd))
    return measures


COLUMNS = {
    ("dino-clip", "style.style"): "style CLIP-I",
    ("dino-clip", "content.content"): "content DINO",
    ("csd", "style.style"): "style CSD",
    ("csd", "content.content"): "content CSD",
}


def summarize_photos(config: BenchConfig, results: Sequence[Mapping[str, Any]], measures: Sequence[str]) -> Report:
    """Collect the similarities of all measures in one row per method; means over photos."""
    summary = summarize(config, results, measures)
    rows = [row.model_copy(update={"seeds": {seed: {} for seed in row.seeds}}) for row in summary.of(measures[0])]
    for measure in measures:
        titles = {figure: title for (kind, figure), title in COLUMNS.items() if measure.startswith(f"{kind}:")}
        for row, source in zip(rows, summary.of(measure), strict=True):
            for seed, figures in source.seeds.items():
                row.seeds[seed].update({title: figures[figure] for figure, title in titles.items()})
    return summary.model_copy(update={"rows": rows, "measures": [measures[0]]})


def photo_table(report: Report) -> str:
    """Format the similarities as a Markdown table."""
    titles = [title for title in COLUMNS.values() if any(title in f for row in report.rows for f in row.seeds.values())]
    return markdown_table(report.rows, {title: title for title in titles})


def write_photo_report(report: Report, folder: Path) -> None:
    """Write report.json and report.md.

    Raises:
        MachineError: disk full, no permission.
    """
    config = report.config
    models = ", ".join(f"{name.upper()} {config[name] or '–'}" for name in ("clip", "dino", "csd"))
    text = (
        f"# Photos\n\nunziplora {report.version}, base {config['base']}; mean cosine to the photo that the LoRAs "
        f"learned from, by {models}.\n\n"
    )
    atomic_write(folder / "report.json", report.model_dump_json(indent=1) + "\n")
    atomic_write(
        folder / "report.md", text + photo_table(report) + "\n\n± is the standard deviation over training seeds.\n"
    )
