"""Images of a run as they are opened before it: fitted to the base, cropped, and shown."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import splits
from PIL import Image

from unziplora.errors import UserError
from unziplora.methods.unziplora.method import UnZipLora
from unziplora.models.base import Scale
from unziplora.training.method import IMAGES, OpenedImages
from unziplora.training.preflight import open_images, preview

SCALE = Scale(1024, 8)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A portrait with a white head on black."""
    picture = Image.new("RGB", (768, 1344), "black")
    picture.paste("white", (284, 0, 484, 200))
    picture.save(tmp_path / "portrait.png")
    return tmp_path / "portrait.png"


def opened(image: Path, scale: Scale = SCALE, **changes: Any) -> OpenedImages:
    return open_images(UnZipLora, splits.config(images=[image], **changes), scale)


def test_a_portrait_is_learned_whole_on_sdxl(image: Path) -> None:
    images = opened(image)
    assert images.size == (768, 1344)
    assert images.groups[IMAGES][0].sizes == (1344, 768, 0, 0, 1344, 768)
    assert images.of()[0].tobytes() == Image.open(image).tobytes()


def test_resolution_keeps_the_proportions(image: Path) -> None:
    assert opened(image, resolution=512).size == (384, 672)


@pytest.mark.filterwarnings("ignore:.* is cut off")
def test_the_bundled_base_stays_square(image: Path) -> None:
    images = opened(image, Scale(128, 8), base="bundled")
    assert (images.size, images.groups[IMAGES][0].sizes) == ((128, 128), (128, 128, 0, 0, 128, 128))
    assert opened(image, Scale(128, 8), base="bundled", fit="bucket").size == (96, 160)


@pytest.mark.filterwarnings("ignore:.* was enlarged")
def test_a_crop_is_fitted_like_an_image(image: Path) -> None:
    images = opened(image, crop="284,0,200,200")
    assert images.size == (1024, 1024)
    assert np.asarray(images.of()[0]).min() == 255


def test_the_square_of_a_mask_is_around_its_subject(image: Path, tmp_path: Path) -> None:
    Image.open(image).convert("L").save(tmp_path / "mask.png")
    images = opened(image, masks=[tmp_path / "mask.png"], fit="crop", resolution=512)
    assert np.asarray(images.of()[0])[:133, 190:322].min() > 240


def test_the_preview_fades_what_does_not_count(image: Path, tmp_path: Path) -> None:
    Image.open(image).convert("L").save(tmp_path / "mask.png")
    shown = preview(opened(image, masks=[tmp_path / "mask.png"]))
    assert (shown.size, shown.getpixel((384, 10)), shown.getpixel((384, 900))) == (
        (768, 1344),
        (255,) * 3,
        (204,) * 3,
    )


def test_several_images_are_shown_on_one_sheet(image: Path) -> None:
    config = splits.config(images=[image] * 5)
    shown = preview(open_images(UnZipLora, config, SCALE))
    assert shown.width > 4 * 768
    assert shown.height > 2 * 1344


@pytest.mark.parametrize("crop", ["700,0,100,100", "0,0,769,10"])
def test_a_crop_outside_the_image_is_refused(image: Path, crop: str) -> None:
    with pytest.raises(UserError, match=rf"crop {crop} is not inside .*portrait.png, which is 768×1344 pixels"):
        opened(image, crop=crop)
