"""Cases of the benchmark: images whose content in other styles, and whose style on other contents, exist."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from unziplora.errors import UserError, first_line

SplitName = Literal["dev", "test"]
CASES = Path(__file__).with_name("cases.zip")


@dataclass(frozen=True)
class Example:
    """Images that show a content word or a style phrase."""

    word: str
    images: tuple[Image.Image, ...]


@dataclass(frozen=True)
class Case:
    """One image f(D): a drawing D of a concept under a filter f.

    Attributes:
        content: word for the concept; the bundled base knows it.
        style: phrase for the filter.
        image: f(D), square.
        targets: D in known styles other than f; the word is the style's phrase.
        others: f on drawings of other concepts; the word is the concept's.
        partner: slug of the case whose style is mixed with this content.
        mix: D under the partner's filter.
        oracle_content: D in known styles other than f, rendered separately from `targets`.
        oracle_style: f on further drawings, which are not among the truths.
        drawing: D as set/concept.
        filter: name of f.
    """

    slug: str
    content: str
    style: str
    image: Image.Image
    targets: tuple[Example, ...]
    others: tuple[Example, ...]
    partner: str
    mix: Image.Image
    oracle_content: tuple[Example, ...] = ()
    oracle_style: tuple[Example, ...] = ()
    drawing: str = ""
    filter: str = ""

    @property
    def words(self) -> dict[str, str]:
        """Content and style as keys of a recipe."""
        return {"content": self.content, "style": self.style}


def load_cases(split: SplitName, path: Path = CASES) -> dict[str, Case]:
    """Load all cases of a split by slug, in their fixed order; partners are neighbors.

    Raises:
        UserError: the file of cases is missing or damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            index = json.loads(archive.read("cases.json"))
            cases = [_read_case(archive, entry) for entry in index["cases"] if entry["split"] == split]
    except (OSError, KeyError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path}: the cases of the benchmark cannot be read ({first_line(error)}). Install unziplora again, "
            "or make them with python -m recipes.bench.cases"
        ) from error
    return {case.slug: case for case in cases}


def select_cases(cases: dict[str, Case], slugs: Sequence[str], quick: bool = False) -> list[Case]:
    """Return the named cases, or all if none is named; with `quick`, only the first two.

    Raises:
        UserError: there is no case of that name.
    """
    for slug in slugs:
        if slug not in cases:
            raise UserError(f"unknown case {slug!r}; the cases are {', '.join(cases)}")
    selection = [cases[slug] for slug in dict.fromkeys(slugs)] or list(cases.values())
    return selection[:2] if quick else selection


def _read_case(archive: zipfile.ZipFile, entry: dict[str, Any]) -> Case:
    def image(name: str) -> Image.Image:
        return Image.open(BytesIO(archive.read(name))).convert("RGB")

    def examples(name: str) -> tuple[Example, ...]:
        return tuple(Example(e["word"], tuple(image(file) for file in e["pictures"])) for e in entry[name])

    values: dict[str, Any] = {
        **{name: entry[name] for name in ("slug", "content", "style", "partner", "drawing", "filter")},
        **{name: examples(name) for name in ("targets", "others", "oracle_content", "oracle_style")},
    }
    return Case(**values, image=image(entry["picture"]), mix=image(entry["mix"]))
