"""Every kind of picture that people have, and every kind of file that is none."""

import os
import re
import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from unziplora.errors import MachineError, UserError
from unziplora.images import files as picture_files
from unziplora.images.preprocess import load_image, load_mask, to_tensor

# left half red, right half blue, 60 wide and 40 high
PICTURE = Image.new("RGB", (60, 40), (200, 30, 30))
PICTURE.paste((30, 30, 200), (30, 0, 60, 40))


def save(picture: Image.Image, path: Path, **options: object) -> Path:
    picture.save(path, **options)
    return path


def halves(picture: Image.Image) -> tuple[tuple[int, ...], tuple[int, ...]]:
    side = picture.width
    return picture.getpixel((2, side // 2)), picture.getpixel((side - 3, side // 2))


def assert_red_and_blue(picture: Image.Image, tolerance: int = 12) -> None:
    left, right = halves(picture)
    np.testing.assert_allclose(left, (200, 30, 30), atol=tolerance)
    np.testing.assert_allclose(right, (30, 30, 200), atol=tolerance)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "avif", "gif", "bmp", "tiff", "jp2", "ppm", "tga"])
def test_formats(tmp_path: Path, suffix: str) -> None:
    path = save(PICTURE, tmp_path / f"a.{suffix}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture = load_image(path, 32)
    assert picture.mode == "RGB"
    assert picture.size == (32, 32)
    assert_red_and_blue(picture, 20)


@pytest.mark.parametrize("mode", ["RGBA", "P", "CMYK", "LAB"])
def test_color_modes(tmp_path: Path, mode: str) -> None:
    suffix = {"CMYK": "jpg", "LAB": "tiff"}.get(mode, "png")
    picture = PICTURE.quantize(8) if mode == "P" else PICTURE.convert(mode)
    assert_red_and_blue(load_image(save(picture, tmp_path / f"a.{suffix}"), 32), 16)


def test_gray_of_any_depth_becomes_the_same_gray(tmp_path: Path) -> None:
    values = np.full((40, 40), 100, dtype=np.uint8)
    eight = save(Image.fromarray(values), tmp_path / "8.png")
    sixteen = save(Image.fromarray(values.astype(np.uint16) * 257), tmp_path / "16.png")
    tiff = save(Image.fromarray(values.astype(np.uint16) * 257), tmp_path / "16.tiff")
    whole = save(Image.fromarray(values.astype(np.int32) * 257), tmp_path / "32.tiff")
    real = save(Image.fromarray((values / 255).astype(np.float32)), tmp_path / "f.tiff")
    with_alpha = save(Image.fromarray(values).convert("LA"), tmp_path / "la.png")
    for path in (eight, sixteen, tiff, whole, real, with_alpha):
        assert load_image(path, 32).getpixel((5, 5)) == (100, 100, 100), path


def test_bits_become_black_and_white(tmp_path: Path) -> None:
    assert load_image(save(Image.new("1", (40, 40), 1), tmp_path / "a.png"), 32).getpixel((0, 0)) == (255,) * 3


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    picture = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    picture.paste((200, 30, 30, 255), (0, 0, 20, 40))
    picture.paste((0, 0, 0, 128), (20, 20, 40, 40))
    for path in (save(picture, tmp_path / "a.png"), save(picture, tmp_path / "a.webp", lossless=True)):
        result = load_image(path, 40)
        assert result.getpixel((5, 5)) == (200, 30, 30)
        assert result.getpixel((35, 5)) == (255, 255, 255)
        assert result.getpixel((35, 35)) == pytest.approx((127, 127, 127), abs=2)
    palette = Image.new("P", (40, 40), 0)
    palette.putpalette([10, 20, 30, 200, 30, 30])
    palette.paste(1, (0, 0, 20, 40))
    result = load_image(save(palette, tmp_path / "p.png", transparency=0), 40)
    assert result.getpixel((35, 5)) == (255, 255, 255)
    assert result.getpixel((5, 5)) == (200, 30, 30)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tiff"])
def test_exif_rotation(tmp_path: Path, orientation: int, suffix: str) -> None:
    inverse = {6: 8, 8: 6}.get(orientation, orientation)
    stored = PICTURE if orientation == 1 else PICTURE.transpose(picture_files._TURNS[inverse])
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(stored, tmp_path / f"a.{suffix}", exif=exif)
    assert_red_and_blue(load_image(path, 32))
    mask = load_mask(path, (8, 8), picture=save(PICTURE, tmp_path / "upright.png"))
    assert mask.shape == (1, 8, 8)


def test_damaged_exif_does_no_harm(tmp_path: Path) -> None:
    path = save(PICTURE, tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff garbage")
    assert_red_and_blue(load_image(path, 32))


def test_color_profiles_are_converted_and_damaged_ones_ignored(tmp_path: Path) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert_red_and_blue(load_image(save(PICTURE, tmp_path / "a.png", icc_profile=profile), 32), 3)
    names = {b"rXYZ": b"bXYZ", b"bXYZ": b"rXYZ"}  # a profile whose red primary is blue, and the other way round
    swapped = re.sub(b"|".join(names), lambda found: names[found[0]], profile)
    left, right = halves(load_image(save(PICTURE, tmp_path / "c.png", icc_profile=swapped), 32))
    np.testing.assert_allclose((left, right), ((30, 30, 200), (200, 30, 30)), atol=3)
    assert_red_and_blue(load_image(save(PICTURE, tmp_path / "b.png", icc_profile=b"garbage"), 32), 3)


def test_the_crop_is_the_middle(tmp_path: Path) -> None:
    wide = Image.new("RGB", (90, 50), "black")
    wide.paste("white", (20, 0, 70, 50))
    result = load_image(save(wide, tmp_path / "a.png"), 50)
    assert np.asarray(result).min() == 255


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tiff"])
def test_of_an_animation_the_first_frame_is_used_with_a_warning(tmp_path: Path, suffix: str) -> None:
    other = Image.new("RGB", PICTURE.size, "lime")
    path = save(PICTURE, tmp_path / f"a.{suffix}", save_all=True, append_images=[other], duration=100)
    with pytest.warns(UserWarning, match="only the first is used") as caught:
        picture = load_image(path, 32)
    assert len(caught) == 1
    assert_red_and_blue(picture, 20)


def test_small_pictures_are_enlarged_with_a_warning(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="only 60×40 pixels and was enlarged to 64×64"):
        assert load_image(save(PICTURE, tmp_path / "a.png"), 64).size == (64, 64)


def test_narrow_pictures_are_cropped_with_a_warning(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="200×40: only the square in its middle"):
        load_image(save(Image.new("RGB", (200, 40)), tmp_path / "a.png"), 32)


@pytest.mark.parametrize(("suffix", "mode"), [("jpg", "RGB"), ("jpg", "CMYK"), ("png", "RGBA"), ("png", "L")])
def test_large_pictures_come_out_like_small_ones(tmp_path: Path, suffix: str, mode: str) -> None:
    ramp = Image.linear_gradient("L").resize((1500, 1200), Image.Resampling.BICUBIC).convert(mode)
    small = load_image(save(ramp, tmp_path / f"a.{suffix}", quality=95), 64)
    expected = np.linspace(0, 255, 64)
    np.testing.assert_allclose(np.asarray(small.convert("L"))[:, 32], expected, atol=8)


def test_missing_empty_folders_and_other_files(tmp_path: Path) -> None:
    def fault(name: str, data: bytes | None = None) -> str:
        path = tmp_path / name
        if data is not None:
            path.write_bytes(data)
        with pytest.raises(UserError) as caught:
            load_image(path, 32)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "no such picture" in fault("gone.png")
    assert "is a folder" in fault(".")
    assert "is empty" in fault("empty.png", b"")
    assert "not a picture" in fault("notes.png", b"dear diary")
    assert "not a picture" in fault("noise.png", bytes(range(256)) * 4)
    assert "HEIC" in fault("phone.heic", b"\0\0\0\x18ftypheic" + b"\0" * 64)
    assert "video" in fault("clip.mp4", b"\0\0\0\x18ftypisom" + b"\0" * 64)
    assert "PDF" in fault("a.pdf", b"%PDF-1.7\n")
    assert "SVG" in fault("a.svg", b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg'/>")
    assert "PostScript" in fault("a.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    assert "web page" in fault("a.jpg", b"<!DOCTYPE html><html>Log in</html>")
    assert "no picture to learn from" in fault("pixel.gif", _bytes(Image.new("RGB", (1, 1)), "GIF"))


def _bytes(picture: Image.Image, kind: str, **options: object) -> bytes:
    buffer = BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "AVIF"])
@pytest.mark.parametrize("share", [0.1, 0.6, 0.9])
def test_truncated_pictures(tmp_path: Path, kind: str, share: float) -> None:
    noise = Image.effect_noise((120, 120), 90).convert("RGB")
    data = _bytes(noise, kind)
    path = tmp_path / "a"
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(UserError, match=r"damaged or cut off|not a picture"):
        load_image(path, 32)


def test_damaged_bytes_never_raise_anything_else(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    noise = Image.effect_noise((64, 64), 90).convert("RGB")
    path = tmp_path / "a"
    for kind in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"):
        for _ in range(25):
            data = bytearray(_bytes(noise, kind))
            for at in random.integers(0, len(data), 12):
                data[at] = random.integers(0, 256)
            path.write_bytes(data)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    load_image(path, 32)
            except (UserError, MachineError):
                pass


def test_huge_pictures_are_refused_with_their_size(tmp_path: Path) -> None:
    path = save(Image.new("1", (20_000, 8_000)), tmp_path / "a.png")
    with pytest.raises(UserError, match=r"too large \(20000×8000; at most 150 megapixels\)"):
        load_image(path, 32)
    bomb = save(Image.new("1", (40_000, 40_000)), tmp_path / "bomb.png")
    with pytest.raises(UserError, match="too large"):
        load_image(bomb, 32)


def test_faults_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(PICTURE, tmp_path / "a.png")

    def raising(error: Exception) -> object:
        def call(*_: object, **__: object) -> None:
            raise error

        return call

    monkeypatch.setattr(Image, "open", raising(PermissionError(13, "Permission denied")))
    with pytest.raises(MachineError, match="no permission"):
        load_image(path, 32)
    monkeypatch.setattr(Image, "open", raising(MemoryError()))
    with pytest.raises(MachineError, match="not enough memory"):
        load_image(path, 32)
    with pytest.raises(MachineError, match="cannot be read"):
        load_image(tmp_path / ("long" * 200), 32)


def test_to_tensor() -> None:
    tensor = to_tensor(Image.new("RGB", (4, 2), (255, 0, 51)))
    assert tensor.shape == (3, 2, 4)
    assert tensor.dtype == torch.float32
    torch.testing.assert_close(tensor[:, 0, 0], torch.tensor([1.0, -1.0, -0.6]))


class TestMasks:
    def test_white_counts_and_the_crop_is_the_pictures(self, tmp_path: Path) -> None:
        mask = Image.new("L", (60, 40), 0)
        mask.paste(255, (30, 0, 60, 40))
        result = load_mask(save(mask, tmp_path / "m.png"), 4, picture=save(PICTURE, tmp_path / "p.png"))
        assert result.shape == (1, 4, 4)
        assert result.dtype == torch.float32
        torch.testing.assert_close(result[0], torch.tensor([0.0, 0, 1, 1]).expand(4, 4))
        assert load_mask(tmp_path / "m.png", (2, 4)).shape == (1, 2, 4)

    def test_of_a_cut_out_the_opaque_part_counts(self, tmp_path: Path) -> None:
        cut = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
        cut.paste((9, 9, 9, 255), (0, 0, 20, 40))
        result = load_mask(save(cut, tmp_path / "m.png"), 4)
        torch.testing.assert_close(result[0], torch.tensor([1.0, 1, 0, 0]).expand(4, 4))
        opaque = save(Image.new("RGBA", (40, 40), (255, 255, 255, 255)), tmp_path / "o.png")
        assert load_mask(opaque, 4).min() == 1

    def test_another_size_of_the_same_shape_will_do(self, tmp_path: Path) -> None:
        picture = save(PICTURE, tmp_path / "p.png")
        assert load_mask(save(Image.new("L", (31, 20), 255), tmp_path / "m.png"), 4, picture).min() == 1

    def test_another_shape_is_refused(self, tmp_path: Path) -> None:
        picture = save(PICTURE, tmp_path / "p.png")
        mask = save(Image.new("L", (60, 60), 255), tmp_path / "m.png")
        with pytest.raises(UserError, match=r"60×60 pixels, its picture .* 60×40: make the mask the same size"):
            load_mask(mask, 4, picture)

    def test_a_black_mask_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="paint the subject white"):
            load_mask(save(Image.new("L", (40, 40), 0), tmp_path / "m.png"), 4)

    def test_a_missing_mask_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"m\.png: no such picture"):
            load_mask(tmp_path / "m.png", 4)


def test_nothing_stays_open(tmp_path: Path) -> None:
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("counts open files through /proc")
    path = save(PICTURE, tmp_path / "a.tiff")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        load_image(path, 32)
    assert len(os.listdir("/proc/self/fd")) == before
