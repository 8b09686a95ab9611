"""The forecast of the tab Split: what will be learned, and what a picture loses on the way."""

import warnings
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("gradio")

from unziplora.studio import split

WORDS = {"content": "rocket", "style": "linocut", "base": "bundled"}


def foreseen(folder: Path, size: tuple[int, int], mask: Image.Image | None = None, **keys: str) -> str:
    """Return the forecast of a picture as HTML; warnings would go to the server's log."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return split.foreseen(folder, folder, {**WORDS, **keys}, Image.new("RGB", size, "teal"), mask)[1]


def test_cut_is_named_with_its_share_and_the_shape_that_keeps_all(tmp_path: Path) -> None:
    html = foreseen(tmp_path, (512, 256))
    assert "50% of the picture is cut off, at the left and right." in html
    assert f"choose the shape “{split.WHOLE}”" in html
    assert "crop the picture to a square" in html
    assert str(tmp_path) not in html


@pytest.mark.parametrize("keys", [{"fit": "pad"}, {"fit": "bucket"}])
def test_shapes_that_keep_a_picture_cause_no_remark(tmp_path: Path, keys: dict[str, str]) -> None:
    assert "remark" not in foreseen(tmp_path, (320, 192), **keys)


def test_shape_that_keeps_all_is_one_of_the_choices() -> None:
    assert dict(split.SHAPES)[split.WHOLE] == "pad"


def test_cut_of_what_was_painted_over_is_named(tmp_path: Path) -> None:
    html = foreseen(tmp_path, (512, 256), Image.new("L", (512, 256), 255))
    assert "50% of what you painted over is cut off" in html


def test_picture_and_mask_come_back_as_they_were_learned(tmp_path: Path) -> None:
    Image.new("I;16", (128, 128), 30000).save(tmp_path / "deep.png")
    mask = Image.new("RGBA", (128, 128), (255, 255, 255, 0))
    mask.paste((255, 255, 255, 255), (0, 0, 64, 128))
    mask.save(tmp_path / "mask.png")
    again = split.edited_again({"images": [tmp_path / "deep.png"], "masks": [tmp_path / "mask.png"]})
    image, painted = split.opened(again)
    assert image.getpixel((9, 9)) == (117, 117, 117)  # 30000 / 65535 · 255
    assert painted.getbbox() == (0, 0, 64, 128)


def test_small_picture_is_named_with_its_size(tmp_path: Path) -> None:
    html = foreseen(tmp_path, (64, 64))
    assert "The picture has only 64 × 64 pixels and is enlarged to 128 × 128" in html
    assert "remark" not in foreseen(tmp_path, (128, 128))


def test_syntax_without_effect_is_named(tmp_path: Path) -> None:
    assert "Leave out (rocket:1.3)" in foreseen(tmp_path, (128, 128), content="(rocket:1.3)")
