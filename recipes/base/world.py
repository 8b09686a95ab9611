"""World of images: drawings × styles, and the parts that are never trained on."""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from recipes.base.config import WorldSettings
from recipes.base.filters import FILTERS, rendered
from recipes.base.filters.common import Pixels
from unziplora.errors import UserError

NEVER_SETS = frozenset({"fxemoji", "noto-v1", "openmoji", "openmoji-black", "unifont"})
NEVER_FILTERS = frozenset({"stained", "clay", "linocut"})
NEVER_CATEGORIES = frozenset({"People & Body", "Smileys & Emotion"})
NEVER_SUBCATEGORIES = frozenset({"time"})
BLACK_SETS = frozenset(
    {"fluent-emoji-high-contrast", "emojione-monotone", "noto-mono-light", "noto-mono-bold", "symbola"}
)
FREE_LICENSES = ("Apache-2.0", "MIT", "OFL-1.1", "CC-BY-4.0", "free")
HELD_OUT_FILE = Path(__file__).with_name("held_out_concepts.txt")


def held_out_concepts() -> frozenset[str]:
    """Return the slugs that no base is trained on."""
    lines = HELD_OUT_FILE.read_text().splitlines()
    return frozenset(line.strip() for line in lines if line.strip() and not line.startswith("#"))


def is_held_out_pair(concept: str, style: str, share: float) -> bool:
    """Return true if a (concept, style) pair is reserved for tests; the rule is fixed and needs no seed."""
    return zlib.crc32(f"{concept}|{style}".encode()) % 1000 < round(1000 * share)


@dataclass(frozen=True)
class Item:
    """Image of the world: a concept from a drawing set, in a style."""

    concept: str
    drawing: str
    style: str
    filter: str | None = None
    variant: int = 0
    natural: bool = False

    @property
    def black(self) -> bool:
        """True if the image cannot show colors named in a caption."""
        return self.drawing in BLACK_SETS or self.filter in {"pencil", "blueprint", "linocut"}


class World:
    """Reader of the zip of drawings (`SET/CONCEPT.webp`, RGBA) and its metadata.

    Raises:
        UserError: the zip or the metadata is missing, or the settings would train on something that must stay unseen.
    """

    def __init__(self, settings: WorldSettings):
        self.settings = settings
        for path in (settings.zip, settings.meta):
            if not path.is_file():
                raise UserError(f"{path} is missing: set [world] zip and meta to the picture world")
        self.meta = json.loads(settings.meta.read_text())
        self.archive = zipfile.ZipFile(settings.zip)
        self.names = frozenset(self.archive.namelist())
        self._check()

    @cached_property
    def concepts(self) -> dict[str, dict]:
        """Metadata by slug of every concept that may be trained on or tested: no people, no clocks."""
        return {
            c["slug"]: c
            for c in self.meta["concepts"]
            if c["category"] not in NEVER_CATEGORIES and c["subcategory"] not in NEVER_SUBCATEGORIES
        }

    @cached_property
    def sets(self) -> dict[str, dict]:
        """Metadata by key of every drawing set."""
        return {s["key"]: s for s in self.meta["sets"]}

    @cached_property
    def trained_concepts(self) -> list[str]:
        """Slugs of the recipe, in order; with "all", every concept that is not held out."""
        if self.settings.concepts == "all":
            return [slug for slug in self.concepts if slug not in held_out_concepts()]
        return list(self.settings.concepts)

    def _check(self) -> None:
        used = {s for style in self.settings.styles.values() for s in style.sets} | set(self.settings.drawings)
        filters = {style.filter for style in self.settings.styles.values()} - {None}
        if bad := used & NEVER_SETS:
            raise UserError(f"sets {sorted(bad)} are never trained on: take them out of the recipe")
        if bad := filters & NEVER_FILTERS:
            raise UserError(f"filters {sorted(bad)} are never trained on: take them out of the recipe")
        if bad := set(self.trained_concepts) & held_out_concepts():
            raise UserError(f"concepts {sorted(bad)} are held out: take them out of the recipe")
        if unknown := set(self.trained_concepts) - set(self.concepts):
            raise UserError(f"unknown or excluded concepts {sorted(unknown)}")
        if unknown := used - set(self.sets) or filters - set(FILTERS):
            raise UserError(f"unknown sets or filters {sorted(unknown)}")
        for key in used:
            if not self.sets[key]["licence"].startswith(FREE_LICENSES):
                raise UserError(f"set {key} has licence {self.sets[key]['licence']}: not allowed for weights")

    def has(self, drawing: str, concept: str) -> bool:
        """Return true if the set has a drawing of the concept."""
        return f"{drawing}/{concept}.webp" in self.names

    def drawing(self, drawing: str, concept: str) -> Pixels:
        """Read the RGBA drawing, uint8 [128, 128, 4]."""
        data = self.archive.read(f"{drawing}/{concept}.webp")
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGBA"))

    def caption(self, concept: str) -> str:
        """Return the concept in words: "red apple"."""
        return self.concepts[concept]["caption"]

    def items(self, *, held_out_pairs: bool = False) -> Iterator[Item]:
        """Yield every image to train on, or with `held_out_pairs` those of the pairs reserved for tests."""
        for name, style in self.settings.styles.items():
            sources = style.sets if style.filter is None else self.settings.drawings
            variants = self.settings.variants if style.filter else 1
            for concept in self.trained_concepts:
                held_out = not style.natural and is_held_out_pair(concept, name, self.settings.held_out_pairs)
                if held_out != held_out_pairs:
                    continue
                for drawing in sources:
                    if self.has(drawing, concept):
                        for variant in range(variants):
                            yield Item(concept, drawing, name, style.filter, variant, style.natural)

    def render(self, item: Item, resolution: int | None = None) -> Pixels:
        """Render an item, uint8 [R, R, 3]: filtered at 128 pixels, then area-averaged."""
        key = f"{self.settings.seed}|{item.concept}|{item.drawing}|{item.filter}|{item.variant}"
        rng = np.random.default_rng(zlib.crc32(key.encode()))
        rgba, size = self.drawing(item.drawing, item.concept), resolution or self.settings.resolution
        return rendered(rgba, item.filter, rng, size)
