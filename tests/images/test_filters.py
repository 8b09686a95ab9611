"""Plain filters: what they keep of an image, and what they remove."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw

from unziplora.images.filters import FILTERS, filtered


def drawing(ground: int, square: int, size: int = 128) -> Image.Image:
    """A square in the middle half of a image."""
    image = Image.new("RGB", (size, size), (ground,) * 3)
    ImageDraw.Draw(image).rectangle((size // 4, size // 4, 3 * size // 4, 3 * size // 4), (square,) * 3)
    return image


def gray(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("L"), dtype=np.float64)


def test_versions_are_the_image_and_others_of_its_size_all_different():
    bands = [Image.effect_mandelbrot((64, 64), (-2, -1.5, 1, 1.5), quality) for quality in (5, 20, 80)]
    image = Image.merge("RGB", bands)
    versions = filtered(image)
    assert versions[0] == image
    assert {p.size for p in versions} == {(64, 64)}
    assert {p.mode for p in versions} == {"RGB"}
    assert len({p.tobytes() for p in versions}) == 1 + len(FILTERS)


@pytest.mark.parametrize(("ground", "square"), [(250, 20), (20, 250), (120, 140)])
def test_edges_are_the_outline_and_never_the_frame(ground: int, square: int):
    edges = gray(FILTERS["edges"](drawing(ground, square)))
    assert edges[32, 48:80].min() > 200  # on the outline
    assert edges[64, 64] < 20  # inside
    assert edges[:8].max() < 20  # the image's own frame
    inverted = gray(FILTERS["edges inverted"](drawing(ground, square)))
    assert np.array_equal(inverted, 255 - edges)


def test_wide_images_keep_their_width():
    wide = drawing(240, 40, size=600)
    for name in ("smoothed", "edges", "edges inverted"):
        assert FILTERS[name](wide).size == (600, 600)
    smoothed = gray(FILTERS["smoothed"](wide))
    assert smoothed[300, 300] == pytest.approx(40, abs=2)
    assert smoothed[40, 40] == pytest.approx(240, abs=2)


@pytest.mark.parametrize("size", [(160, 96), (600, 300), (40, 500)])
def test_proportions_are_kept(size: tuple[int, int]):
    image = Image.linear_gradient("L").rotate(90).resize(size).convert("RGB")  # no two columns are alike
    assert {version.size for version in filtered(image)} == {size}
    across = np.abs(np.diff(gray(FILTERS["coarse"](image))[0])) > 0
    cells = np.diff(np.flatnonzero(across))
    assert cells.mean() == pytest.approx(np.sqrt(size[0] * size[1]) / 24, rel=0.2)  # about as wide as high
