"""Render the benchmark's cases: ``python -m recipes.bench.cases WORLD.zip META OUT.zip``.

A case is a drawing D of a concept under a filter f. Its truths are rendered too: D under other filters, f on other
drawings, and D under the filter of the case's partner.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from recipes import run
from recipes.base.captions import STYLE_WORDS
from recipes.base.filters import rendered
from recipes.base.filters.common import Pixels, finish
from unziplora.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TABLE = Path(__file__).with_name("cases.toml")
FREE = ("Apache-2.0", "CC-BY-4.0")
CHANCELESS = "neon"
"""Only filter without noise: a second rendering gives the same image. (Of pixel art, only the background differs.)"""
STAMP = (2020, 1, 1, 0, 0, 0)
"""Time of every file in the zip, so that the same cases give the same bytes, except for a processor's rounding."""

NOTICE = """Pictures of the benchmark of unziplora: drawings of free emoji sets under filters of its own.
noto-v1 (Noto Emoji, first version): (c) Google, under the Apache License 2.0,
https://www.apache.org/licenses/LICENSE-2.0, from https://github.com/googlefonts/noto-emoji.
fxemoji (FxEmojis): (c) Mozilla Foundation, its visual design under the Creative Commons Attribution 4.0
International licence, https://creativecommons.org/licenses/by/4.0/, from https://github.com/mozilla/fxemoji.
Changed: the drawings were filtered and reduced in size.
"""

Data = dict[str, Any]


class Draws(np.random.Generator):
    """Random numbers of one rendering: single choices (an ink) depend on the look, fields of noise on the image."""

    def __init__(self, look: int, image: int) -> None:
        super().__init__(np.random.PCG64(image))
        self._look = np.random.default_rng(look)

    def integers(self, low: Any, high: Any = None, size: Any = None, **options: Any) -> Any:
        source = self._look if size is None else super()
        return source.integers(low, high, size, **options)

    def random(self, size: Any = None, **options: Any) -> Any:
        return (self._look if size is None else super()).random(size, **options)


@dataclass(frozen=True)
class Look:
    """Filter with its free choices fixed, or no filter.

    Attributes:
        name: part of the images' file names and of their seeds.
        filter: a key of FILTERS, or 'flat' for the drawing as it is.
        phrase: words for it in prompts.
        new: whether the base has never seen the filter.
        seed: seed of single choices.
        tint: factors of red, green, blue.
    """

    name: str
    filter: str
    phrase: str
    new: bool = False
    seed: int = 0
    tint: Sequence[float] = (1.0, 1.0, 1.0)

    @classmethod
    def known(cls, style: str) -> Look:
        """Return a style as the base has learned it."""
        return cls(style, style, STYLE_WORDS[style][0])

    def alike(self, other: Look) -> bool:
        """Return true if two looks differ in nothing but their names."""
        return (self.filter, self.seed, tuple(self.tint)) == (other.filter, other.seed, tuple(other.tint))

    def render(self, rgba: Pixels, resolution: int, seed: int) -> NDArray[np.uint8]:
        """Render a drawing [S, S, 4] as uint8 [R, R, 3]: filtered, then area-averaged, then tinted."""
        name = None if self.filter == "flat" else self.filter
        small = rendered(rgba, name, Draws(self.seed, seed), resolution)
        return finish(small.astype(np.float32) * np.float32(self.tint))


@dataclass
class Builder:
    """Table with the drawings, and the images rendered so far by file name."""

    table: Data
    archive: zipfile.ZipFile
    meta: Data
    images: dict[str, NDArray[np.uint8]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.looks = {name: Look(name, **values) for name, values in self.table["looks"].items()}
        self.words = {concept["slug"]: concept["caption"] for concept in self.meta["concepts"]}
        self.names = frozenset(self.archive.namelist())
        licenses = {entry["key"]: entry["licence"] for entry in self.meta["sets"]}
        for drawing in self.table["drawings"]:
            if licenses.get(drawing) not in FREE:
                free = " or ".join(FREE)
                raise UserError(f"set {drawing} is under {licenses.get(drawing)}, not {free}: it may not be shipped")

    def image(self, look: Look, drawing: str, concept: str, number: int = 0) -> str:
        """Render an image, unless it is there, and return its file name; `number` distinguishes renderings."""
        name = f"{look.name}/{concept}-{drawing}-{number}.webp"
        if name not in self.images:
            data = self.archive.read(f"{drawing}/{concept}.webp")
            rgba = np.asarray(Image.open(io.BytesIO(data)).convert("RGBA"))
            seed = zlib.crc32(f"{self.table['seed']}|{name}".encode())
            self.images[name] = look.render(rgba, self.table["resolution"], seed)
        return name

    def cases(self, split: str) -> Iterator[Data]:
        """Yield the cases of a split, every image by its file name."""
        part = self.table[split]
        for number, (concept, drawing, name) in enumerate(part["cases"]):
            look, partner = self.looks[name], part["cases"][number ^ 1]
            self._check(split, concept, drawing, look)
            targets = self._targets(look, drawing, concept, number)
            yield {
                "slug": slug(concept, name),
                "split": split,
                "content": self.words[concept],
                "style": look.phrase,
                "drawing": f"{drawing}/{concept}",
                "filter": look.filter,
                "new": look.new,
                "seed": look.seed,
                "tint": list(look.tint),
                "picture": self.image(look, drawing, concept),
                "targets": targets,
                "others": self._others(part, name),
                "partner": slug(partner[0], partner[2]),
                "mix": self.image(self.looks[partner[2]], drawing, concept),
                "oracle_content": self._oracle_content(look, drawing, concept, targets),
                "oracle_style": self._oracle_style(part, name),
            }

    def _check(self, split: str, concept: str, drawing: str, look: Look) -> None:
        other = self.table["test" if split == "dev" else "dev"]
        if concept in other["concepts"] or concept not in self.table[split]["concepts"]:
            raise UserError(f"{concept}: must be among the concepts of {split}, and not of the other split")
        if drawing not in self.table["drawings"]:
            raise UserError(f"{concept}: set {drawing} is not among {self.table['drawings']}")
        known = {self.looks[name].filter for *_, name in other["cases"] if not self.looks[name].new}
        if look.filter in known:
            raise UserError(f"{look.name}: filter {look.filter} is one of the other split")
        if any(self.looks[name].alike(look) for *_, name in other["cases"]):
            raise UserError(f"{look.name}: the other split has the same look")

    def _targets(self, look: Look, drawing: str, concept: str, number: int) -> list[Data]:
        """Return four known styles other than the case's, in turn."""
        styles = [style for style in self.table["targets"] if style != look.filter]
        chosen = [Look.known(styles[(number + step) % len(styles)]) for step in range(4)]
        return [{"word": known.phrase, "pictures": [self.image(known, drawing, concept)]} for known in chosen]

    def _others(self, part: Data, name: str) -> list[Data]:
        """Return four concepts that no case shows in this look, each in every drawing set."""
        look, sets = self.looks[name], self.table["drawings"]
        others = {other: [s for s in sets if self.has(s, other)] for other in self.other_concepts(part, name)}
        return [
            {"word": self.words[o], "pictures": [self.image(look, s, o) for s in sets]} for o, sets in others.items()
        ]

    def has(self, drawing: str, concept: str) -> bool:
        """Return true if a set has a drawing of the concept."""
        return f"{drawing}/{concept}.webp" in self.names

    def other_concepts(self, part: Data, name: str) -> list[str]:
        """Return the four concepts on which a look is tested: the same for all its cases."""
        start = 3 * sorted(self.looks).index(name)
        free = [concept for concept in part["concepts"] if concept not in shown(part, name)]
        return [free[(start + 2 * step) % len(free)] for step in range(4)]

    def _oracle_content(self, look: Look, drawing: str, concept: str, targets: list[Data]) -> list[Data]:
        """Return second renderings of the drawing in known styles, without the case's own and without any truth."""
        truths = {example["word"] for example in targets}
        every = [Look.known(style) for style in self.table["oracle_targets"] if style != look.filter]
        chosen = [known for known in every if not (known.filter == CHANCELESS and known.phrase in truths)]
        return [{"word": known.phrase, "pictures": [self.image(known, drawing, concept, 1)]} for known in chosen]

    def _oracle_style(self, part: Data, name: str) -> list[Data]:
        """Return the look on drawings that no truth shows."""
        taken = {*shown(part, name), *self.other_concepts(part, name)}
        free = [concept for concept in part["concepts"] if concept not in taken]
        turns = [(concept, (number + turn) % 2) for turn in (0, 1) for number, concept in enumerate(free)]
        every = [(self.table["drawings"][turn], concept) for concept, turn in turns]
        chosen = [pair for pair in every if self.has(*pair)][: self.table["oracle_drawings"]]
        look = self.looks[name]
        return [{"word": self.words[concept], "pictures": [self.image(look, s, concept)]} for s, concept in chosen]

    def attributions(self) -> list[Data]:
        """Return the sources and licenses of the drawings."""
        sets = [entry for entry in self.meta["sets"] if entry["key"] in self.table["drawings"]]
        return [{key: entry.get(key, "") for key in ("key", "licence", "package")} for entry in sets]


def slug(concept: str, look: str) -> str:
    """Return the name of a case."""
    return f"{concept}-{look.removeprefix('dev-')}"


def shown(part: Data, name: str) -> set[str]:
    """Return the concepts of a look's inputs and mixes: its cases and their partners."""
    cases = part["cases"]
    numbers = [number for number, case in enumerate(cases) if case[2] == name]
    return {cases[other][0] for number in numbers for other in (number, number ^ 1)}


def build(world: Path, meta: Path, out: Path, table: Path = TABLE) -> list[Data]:
    """Write the zip of images, cases.json and NOTICE; return the cases."""
    with zipfile.ZipFile(world) as archive:
        builder = Builder(tomllib.loads(table.read_text()), archive, json.loads(meta.read_text()))
        cases = [case for split in ("dev", "test") for case in builder.cases(split)]
    out.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(out, "w") as target:
        content = {"attributions": builder.attributions(), "cases": cases}
        rows = [f"- {entry['key']}: {entry['licence']}, {entry['package']}\n" for entry in content["attributions"]]
        for name, text in (("cases.json", json.dumps(content, indent=1)), ("NOTICE", "".join([NOTICE, *rows]))):
            target.writestr(zipfile.ZipInfo(name, STAMP), text, zipfile.ZIP_DEFLATED)
        for name, pixels in sorted(builder.images.items()):
            data = io.BytesIO()
            Image.fromarray(pixels).save(data, "webp", quality=90, method=6)
            target.writestr(zipfile.ZipInfo(name, STAMP), data.getvalue())
    return cases


def main() -> None:
    """Render the cases into a zip."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    for name, text in (("world", "zip of drawings"), ("meta", "its metadata"), ("out", "zip to write")):
        parser.add_argument(name, type=Path, help=text)
    options = parser.parse_args()
    cases = build(options.world, options.meta, options.out)
    print(f"{len(cases)} cases, {options.out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    run(main)
