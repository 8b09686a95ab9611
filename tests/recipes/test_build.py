"""Parts of the build of the world, without a download."""

from __future__ import annotations

import json

import numpy as np
from toy import shape

from recipes.base.build import SIZE, WORLD, fit, in_ranges, plain, svg
from recipes.base.world import held_out_concepts


def test_code_points_lose_selectors_and_match_ranges() -> None:
    assert plain("2600-FE0F") == "2600"
    assert plain("0023-fe0f-20e3") == "23-20e3"
    assert in_ranges(0x1F34E, "U+23,U+1f300-1f400")
    assert in_ranges(0x23, "U+23,U+1f300-1f400")
    assert not in_ranges(0x24, "U+23,U+1f300-1f400")


def test_aliases_share_the_body_of_their_parent() -> None:
    icons = {"width": 32, "icons": {"a": {"body": "<g/>"}}, "aliases": {"b": {"parent": "a"}}}
    assert svg(icons, "b") == svg(icons, "a")
    assert 'viewBox="0 0 32 16"' in svg(icons, "a")


def test_fit_centers_the_drawing_at_nine_tenths() -> None:
    large = np.zeros((300, 300, 4), np.uint8)
    large[:128, 172:] = shape(1, 1)
    fitted = fit(large)
    assert fitted is not None
    assert fitted.shape == (SIZE, SIZE, 4)
    rows, columns = np.where(fitted[..., 3] > 128)
    assert abs(max(np.ptp(rows), np.ptp(columns)) + 1 - 0.9 * SIZE) <= 2
    assert abs(rows.min() + rows.max() - SIZE) <= 3
    assert fit(np.zeros((64, 64, 4), np.uint8)) is None


def test_world_lists_every_held_out_concept() -> None:
    world = json.loads(WORLD.read_text())
    slugs = [concept["slug"] for concept in world["concepts"]]
    assert len(slugs) == len(set(slugs)) == 1183
    assert held_out_concepts() <= set(slugs)
