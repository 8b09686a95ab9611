"""The scale of a base: its own resolution, and the sizes of images that it learns."""

from pathlib import Path

import pytest

from unziplora.config.bases import SDXL
from unziplora.models.base import Base, Scale
from unziplora.models.sizes import scale_of

PUBLISHED = (
    *((512, 2048), (512, 1984), (512, 1920), (512, 1856), (576, 1792), (576, 1728), (576, 1664), (640, 1600)),
    *((640, 1536), (704, 1472), (704, 1408), (704, 1344), (768, 1344), (768, 1280), (832, 1216), (832, 1152)),
    *((896, 1152), (896, 1088), (960, 1088), (960, 1024)),
)
"""Sizes below the square in SDXL's training (arXiv 2307.01952, appendix I)."""


def test_sizes_at_1024_pixels_are_those_of_sdxl_and_their_transposes() -> None:
    sizes = Scale(1024, 8).sizes(1024)
    assert set(sizes) == {(1024, 1024), *PUBLISHED, *((height, width) for width, height in PUBLISHED)}


@pytest.mark.parametrize("side", [64, 128, 512, 768, 1056, 1536])
def test_sizes_of_any_side_fit_the_unet_and_its_area(side: int) -> None:
    sizes = Scale(1024, 8).sizes(side)
    assert sizes[0] == (side, side)
    for width, height in sizes:
        assert width % 32 == height % 32 == 0
        assert 0.9 * side**2 <= width * height <= side**2


def test_scale_is_read_from_configurations_alone(tiny_folder: Path, tiny_checkpoint: Path, shared_base: Base) -> None:
    assert scale_of(str(tiny_folder)) == scale_of(str(tiny_checkpoint)) == shared_base.scale == Scale(64, 8)
    assert scale_of("bundled") == Scale(128, 8)


def test_scale_of_a_base_that_must_be_downloaded_is_that_of_sdxl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unziplora.models.sizes._downloaded", lambda _: None)
    assert scale_of(SDXL) == Scale(1024, 8)
