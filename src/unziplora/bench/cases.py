"""The cases of the benchmark: pictures of which the content in other styles, and the style on other contents, exist."""

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

Split = Literal["dev", "test"]
CASES = Path(__file__).with_name("cases.zip")


@dataclass(frozen=True)
class Example:
    """Pictures that show a content word or a style phrase."""

    word: str
    pictures: tuple[Image.Image, ...]


@dataclass(frozen=True)
class Case:
    """One picture f(D): a drawing D of a concept, under a filter f.

    Attributes:
        slug: its name.
        content: word for the concept, known to the bundled base.
        style: phrase for the filter.
        new: whether the bundled base has never seen the filter.
        drawing: D as set/concept.
        filter: f.
        seed: of the filter's free choices.
        tint: factors of red, green, blue after the filter.
        picture: f(D), square.
        targets: D in known styles other than f; the word is the style's phrase.
        others: f on drawings of other concepts; the word is the concept's.
        partner: slug of the case whose style the content is mixed with.
        mix: D under the partner's filter.
        oracle_content: D in known styles, rendered anew, without f.
        oracle_style: f on further drawings, of which no truth is made.
    """

    slug: str
    content: str
    style: str
    new: bool
    drawing: str
    filter: str
    seed: int
    tint: tuple[float, ...]
    picture: Image.Image
    targets: tuple[Example, ...]
    others: tuple[Example, ...]
    partner: str
    mix: Image.Image
    oracle_content: tuple[Example, ...]
    oracle_style: tuple[Example, ...]

    @property
    def words(self) -> dict[str, str]:
        """The words for its content and its style, as recipes call them."""
        return {"content": self.content, "style": self.style}


def load_cases(split: Split, path: Path = CASES) -> dict[str, Case]:
    """All cases of a split by slug, in their fixed order; partners are neighbors.

    Raises:
        UserError: the file of cases is missing or damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            told = json.loads(archive.read("cases.json"))
            cases = [_case(archive, entry) for entry in told["cases"] if entry["split"] == split]
    except (OSError, KeyError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path}: no cases of the benchmark can be read from here ({first_line(error)}). Install unziplora anew, "
            "or make them with python -m recipes.bench.cases"
        ) from error
    return {case.slug: case for case in cases}


def choose(cases: dict[str, Case], slugs: Sequence[str], quick: bool = False) -> list[Case]:
    """The named cases, or all; quick: the first two of these.

    Raises:
        UserError: a name is not known.
    """
    for slug in slugs:
        if slug not in cases:
            raise UserError(f"no case {slug!r}: there are {', '.join(cases)}")
    chosen = [cases[slug] for slug in dict.fromkeys(slugs)] or list(cases.values())
    return chosen[:2] if quick else chosen


def _case(archive: zipfile.ZipFile, entry: dict[str, Any]) -> Case:
    def picture(name: str) -> Image.Image:
        return Image.open(BytesIO(archive.read(name))).convert("RGB")

    def examples(name: str) -> tuple[Example, ...]:
        return tuple(Example(e["word"], tuple(picture(file) for file in e["pictures"])) for e in entry[name])

    values: dict[str, Any] = {
        **entry,
        **{name: examples(name) for name in ("targets", "others", "oracle_content", "oracle_style")},
        **{name: picture(entry[name]) for name in ("picture", "mix")},
        "tint": tuple(entry["tint"]),
    }
    del values["split"]
    return Case(**values)
