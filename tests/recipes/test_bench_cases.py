"""Rendering of cases from a table: nothing leaks, and the same table gives the same bytes."""

from __future__ import annotations

import io
import json
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from toy import shape

from recipes.base.filters import FILTERS
from recipes.bench.cases import TABLE as SHIPPED
from recipes.bench.cases import Draws, Look, build
from unziplora.bench.cases import CASES
from unziplora.errors import UserError

CONCEPTS = ["key", "star", "house", "bell", "fish", "frog", "crown", "cactus", "tulip", "panda", "castle", "guitar"]

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


TABLE = """
resolution = 32
seed = 1
drawings = ["fxemoji", "noto-v1"]
targets = ["neon", "pixelart", "crayon", "pencil", "halftone"]
oracle_targets = ["flat", "neon", "pencil"]
oracle_drawings = 4
[looks]
clay = { filter = "clay", phrase = "clay", new = true }
oil-cool = { filter = "oil", phrase = "oil painting", tint = [0.5, 0.8, 1.0] }
[dev]
concepts = []
cases = []
[test]
"""


@pytest.fixture
def world(tmp_path: Path) -> tuple[Path, Path]:
    """A zip of polygons, and its metadata."""
    concepts = [{"slug": slug, "caption": slug} for slug in CONCEPTS]
    sets = [{"key": key, "licence": "Apache-2.0", "package": f"npm {key}"} for key in ("fxemoji", "noto-v1")]
    sets.append({"key": "openmoji", "licence": "CC-BY-SA-4.0", "package": "npm openmoji"})
    (tmp_path / "meta.json").write_text(json.dumps({"concepts": concepts, "sets": sets}))
    with zipfile.ZipFile(tmp_path / "world.zip", "w") as archive:
        for number, slug in enumerate(CONCEPTS):
            for s, key in enumerate(("fxemoji", "noto-v1")):
                data = io.BytesIO()
                Image.fromarray(shape(number, s)).save(data, "webp", lossless=True)
                archive.writestr(f"{key}/{slug}.webp", data.getvalue())
    return tmp_path / "world.zip", tmp_path / "meta.json"


def table(folder: Path, text: str = TABLE, cases: str = '["key", "fxemoji", "clay"], ["star", "noto-v1", "oil-cool"]'):
    path = folder / "cases.toml"
    path.write_text(f"{text}concepts = {json.dumps(CONCEPTS[:-2])}\ncases = [{cases}]\n")
    return path


def test_cases_name_stored_images(world: tuple[Path, Path], tmp_path: Path):
    cases = build(*world, tmp_path / "a.zip", table(tmp_path))
    build(*world, tmp_path / "b.zip", tmp_path / "cases.toml")
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    first, second = cases
    assert (first["slug"], first["partner"]) == ("key-clay", second["slug"])
    assert (first["mix"], second["mix"]) == ("oil-cool/key-fxemoji-0.webp", "clay/star-noto-v1-0.webp")
    assert not {"key", "star"} & {example["word"] for case in cases for example in case["others"]}
    assert len(first["oracle_style"]) == 4
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert json.loads(archive.read("cases.json"))["cases"] == cases
        assert "npm noto-v1" in archive.read("NOTICE").decode()
        assert "openmoji" not in archive.read("NOTICE").decode()
        names = {name for case in cases for e in case["others"] for name in e["pictures"]}
        assert names <= set(archive.namelist())
        assert Image.open(io.BytesIO(archive.read(first["picture"]))).size == (32, 32)


@pytest.mark.parametrize(
    ("change", "cases", "message"),
    [
        (("fxemoji", "openmoji"), '["key", "openmoji", "clay"], ["star", "noto-v1", "clay"]', "may not be shipped"),
        (("x", "x"), '["apple", "fxemoji", "clay"], ["star", "noto-v1", "clay"]', "among the concepts of test"),
        (("x", "x"), '["key", "openmoji", "clay"], ["star", "noto-v1", "clay"]', "set openmoji is not among"),
        (("concepts = []", 'concepts = ["key"]'), '["key", "fxemoji", "clay"], ["star", "noto-v1", "clay"]', "not of"),
        (
            (
                "concepts = []\ncases = []",
                'concepts = ["castle", "guitar"]\n'
                'cases = [["castle", "fxemoji", "oil-cool"], ["guitar", "fxemoji", "clay"]]',
            ),
            '["key", "fxemoji", "oil-cool"], ["star", "noto-v1", "clay"]',
            "filter oil is one of the other split",
        ),
    ],
)
def test_leaking_table_raises(
    world: tuple[Path, Path], tmp_path: Path, change: tuple[str, str], cases: str, message: str
):
    with pytest.raises(UserError, match=message):
        build(*world, tmp_path / "out.zip", table(tmp_path, TABLE.replace(*change), cases))
    assert not (tmp_path / "out.zip").exists()


def test_shipped_cases_equal_the_table():
    table_of_cases = tomllib.loads(SHIPPED.read_text())
    with zipfile.ZipFile(CASES) as archive:
        cases = json.loads(archive.read("cases.json"))["cases"]
    looks = {"dev": set(), "test": set()}
    for split, seen in looks.items():
        mine = [case for case in cases if case["split"] == split]
        assert len(mine) == len(table_of_cases[split]["cases"])
        for case, (concept, drawing, name) in zip(mine, table_of_cases[split]["cases"], strict=True):
            look = Look(name, **table_of_cases["looks"][name])
            assert (case["drawing"], case["style"]) == (f"{drawing}/{concept}", look.phrase)
            assert (case["filter"], case["seed"], case["tint"]) == (look.filter, look.seed, list(look.tint))
            seen.add((look.filter, look.seed, tuple(look.tint)))
    assert not looks["dev"] & looks["test"]


def test_look_keeps_ink_while_noise_changes():
    colors = []
    for seed in range(6):
        pixels = Look("x", "linocut", "linocut", seed=4).render(shape(3, 1), 64, seed).reshape(-1, 3)
        colors.append(pixels[pixels.sum(1).argmin()].astype(int))
    assert np.ptp(colors, axis=0).max() < 40
    assert all(color[2] > color[0] + 20 for color in colors)  # a blue ink
    first, second = (FILTERS["linocut"](shape(3, 1), Draws(4, seed)) for seed in (0, 1))
    assert not np.array_equal(first, second)


def test_tint_multiplies_colors():
    plain = Look("x", "clay", "clay").render(shape(2, 0), 32, 7).astype(float)
    tinted = Look("x", "clay", "clay", tint=(1.0, 0.5, 0.0)).render(shape(2, 0), 32, 7)
    assert np.abs(tinted - plain * (1.0, 0.5, 0.0)).max() <= 1
