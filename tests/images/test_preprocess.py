"""Images of every kind, and files of every kind that are not images."""

import os
import re
import warnings
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageOps

from unziplora.errors import MachineError, UserError
from unziplora.images.files import open_upright
from unziplora.images.preprocess import check_images, load_image, load_mask, to_tensor

# left half red, right half blue, 60 wide and 40 high
IMAGE = Image.new("RGB", (60, 40), (200, 30, 30))
IMAGE.paste((30, 30, 200), (30, 0, 60, 40))


def save(image: Image.Image, path: Path, **options: object) -> Path:
    image.save(path, **options)
    return path


def halves(image: Image.Image) -> tuple[tuple[int, ...], tuple[int, ...]]:
    side = image.width
    return image.getpixel((2, side // 2)), image.getpixel((side - 3, side // 2))


def assert_red_and_blue(image: Image.Image, tolerance: int = 12) -> None:
    left, right = halves(image)
    np.testing.assert_allclose(left, (200, 30, 30), atol=tolerance)
    np.testing.assert_allclose(right, (30, 30, 200), atol=tolerance)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "avif", "gif", "bmp", "tiff", "jp2", "ppm", "tga"])
def test_every_format_is_read(tmp_path: Path, suffix: str) -> None:
    path = save(IMAGE, tmp_path / f"a.{suffix}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = load_image(path, 32)
    assert image.mode == "RGB"
    assert image.size == (32, 32)
    assert_red_and_blue(image, 20)


@pytest.mark.parametrize("mode", ["RGBA", "P", "CMYK", "LAB"])
def test_every_color_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    suffix = {"CMYK": "jpg", "LAB": "tiff"}.get(mode, "png")
    image = IMAGE.quantize(8) if mode == "P" else IMAGE.convert(mode)
    assert_red_and_blue(load_image(save(image, tmp_path / f"a.{suffix}"), 32), 16)


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


def test_transparency_becomes_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    image.paste((200, 30, 30, 255), (0, 0, 20, 40))
    image.paste((0, 0, 0, 128), (20, 20, 40, 40))
    for path in (save(image, tmp_path / "a.png"), save(image, tmp_path / "a.webp", lossless=True)):
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


TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
"""Inverses of what EXIF's orientations ask for."""


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
def test_exif_orientation_is_undone(tmp_path: Path, orientation: int, suffix: str) -> None:
    stored = IMAGE if orientation == 1 else IMAGE.transpose(TURNS[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(stored, tmp_path / f"a.{suffix}", exif=exif)
    assert_red_and_blue(load_image(path, 32), 20)
    assert load_mask(path, (8, 8), IMAGE.size).shape == (1, 8, 8)


@pytest.mark.parametrize("suffix", ["jpg", "png", "tiff"])
def test_reduced_images_are_turned_after_their_reduction(tmp_path: Path, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    noise = Image.effect_noise((331, 250), 90)
    path = save(noise, tmp_path / f"a.{suffix}", exif=exif, quality=95)
    image, size = open_upright(path, 40)
    stored, stored_size = open_upright(save(noise, tmp_path / f"b.{suffix}", quality=95), 40)
    assert size == stored_size[::-1] == (250, 331)
    assert image.size == stored.size[::-1]
    if suffix != "tiff":  # Pillow turns these itself, before they are reduced
        assert image.tobytes() == stored.transpose(Image.Transpose.ROTATE_270).tobytes()


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "CMYK"])
def test_tiff_files_on_their_side_are_read_in_every_mode(tmp_path: Path, mode: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = Image.effect_noise((66, 50), 90).convert(mode)
    image, size = open_upright(save(stored, tmp_path / "a.tiff", exif=exif), 50)
    assert size == (50, 66)
    assert image.tobytes() == stored.transpose(Image.Transpose.ROTATE_270).tobytes()


def test_damaged_exif_does_no_harm(tmp_path: Path) -> None:
    path = save(IMAGE, tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff garbage")
    assert_red_and_blue(load_image(path, 32))


def test_an_image_is_turned_though_its_exif_cannot_be_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save(IMAGE.transpose(TURNS[6]), tmp_path / "a.jpg", exif=exif)
    monkeypatch.setattr(Image.Exif, "tobytes", lambda *_: 1 / 0)
    assert_red_and_blue(load_image(path, 32))


def test_color_profiles_are_converted_and_damaged_ones_ignored(tmp_path: Path) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert_red_and_blue(load_image(save(IMAGE, tmp_path / "a.png", icc_profile=profile), 32), 3)
    names = {b"rXYZ": b"bXYZ", b"bXYZ": b"rXYZ"}  # a profile whose red primary is blue, and the other way round
    swapped = re.sub(b"|".join(names), lambda match: names[match[0]], profile)
    left, right = halves(load_image(save(IMAGE, tmp_path / "c.png", icc_profile=swapped), 32))
    np.testing.assert_allclose((left, right), ((30, 30, 200), (200, 30, 30)), atol=3)
    assert_red_and_blue(load_image(save(IMAGE, tmp_path / "b.png", icc_profile=b"garbage"), 32), 3)


def test_the_crop_is_the_middle(tmp_path: Path) -> None:
    wide = Image.new("RGB", (90, 50), "black")
    wide.paste("white", (20, 0, 70, 50))
    result = load_image(save(wide, tmp_path / "a.png"), 50)
    assert np.asarray(result).min() == 255


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tiff"])
def test_first_frame_of_an_animation_is_used_with_a_warning(tmp_path: Path, suffix: str) -> None:
    other = Image.new("RGB", IMAGE.size, "lime")
    path = save(IMAGE, tmp_path / f"a.{suffix}", save_all=True, append_images=[other], duration=100)
    with pytest.warns(UserWarning, match="only the first is used") as caught:
        image = load_image(path, 32)
    assert len(caught) == 1
    assert_red_and_blue(image, 20)


@pytest.mark.parametrize(
    ("images", "side", "message"),
    [
        ([Image.new("RGB", (200, 40))], 32, "only the square in its middle"),
        ([IMAGE], 64, "was enlarged"),
        ([IMAGE, Image.new("RGB", IMAGE.size, "lime")], 32, "only the first is used"),
    ],
)
def test_warnings_raised_as_errors_stay_warnings(
    tmp_path: Path, images: list[Image.Image], side: int, message: str
) -> None:
    path = save(images[0], tmp_path / "a.gif", save_all=True, append_images=images[1:], duration=100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=message):
            load_image(path, side)
        with pytest.raises(UserWarning, match=message):
            check_images([path], [], side)


@pytest.mark.parametrize("kind", [ValueError, OSError, PermissionError, MemoryError, UserWarning, KeyboardInterrupt])
def test_faults_after_the_reading_are_not_faults_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[BaseException]
) -> None:
    path = save(IMAGE, tmp_path / "a.png")

    def fit(*_: object, **__: object) -> Image.Image:
        raise kind("elsewhere")

    monkeypatch.setattr(ImageOps, "fit", fit)
    for load in (load_image, load_mask):
        with pytest.raises(kind, match="elsewhere"):
            load(path, 32)


def test_a_fault_of_the_conversion_is_one_of_the_file(tmp_path: Path) -> None:
    def convert(image: Image.Image) -> Image.Image:
        raise ValueError("bad palette")

    with pytest.raises(UserError, match=r"a\.png: damaged or cut off, .* \(bad palette\)"):
        open_upright(save(IMAGE, tmp_path / "a.png"), 32, convert)


def test_images_and_masks_are_checked_with_each_file_opened_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [save(IMAGE, tmp_path / f"{n}.png") for n in range(2)]
    mask = save(Image.new("L", (60, 60), 255), tmp_path / "m.png")
    opened: list[Path] = []
    read = Image.open
    monkeypatch.setattr(
        Image, "open", lambda file, **options: (opened.append(Path(file.name)), read(file, **options))[1]
    )
    check_images(images, images[:1], 32)
    assert opened == [images[0], images[0], images[1]]
    with pytest.raises(UserError, match="make the mask the same size"):
        check_images(images, [mask], 32)


def test_small_images_are_enlarged_with_a_warning(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="only 60×40 pixels and was enlarged to 64×64"):
        assert load_image(save(IMAGE, tmp_path / "a.png"), 64).size == (64, 64)


def test_narrow_images_are_cropped_with_a_warning(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="200×40: only the square in its middle"):
        load_image(save(Image.new("RGB", (200, 40)), tmp_path / "a.png"), 32)


@pytest.mark.parametrize(("suffix", "mode"), [("jpg", "RGB"), ("jpg", "CMYK"), ("png", "RGBA"), ("png", "L")])
def test_large_images_come_out_like_small_ones(tmp_path: Path, suffix: str, mode: str) -> None:
    ramp = Image.linear_gradient("L").resize((1500, 1200), Image.Resampling.BICUBIC).convert(mode)
    small = load_image(save(ramp, tmp_path / f"a.{suffix}", quality=95), 64)
    expected = np.linspace(0, 255, 64)
    np.testing.assert_allclose(np.asarray(small.convert("L"))[:, 32], expected, atol=8)


def test_files_that_are_not_images_are_named_for_what_they_are(tmp_path: Path) -> None:
    def fault(name: str, data: bytes | None = None) -> str:
        path = tmp_path / name
        if data is not None:
            path.write_bytes(data)
        with pytest.raises(UserError) as caught:
            load_image(path, 32)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "no such image" in fault("gone.png")
    assert "is a folder" in fault(".")
    assert "is empty" in fault("empty.png", b"")
    assert "not an image" in fault("notes.png", b"dear diary")
    assert "not an image" in fault("noise.png", bytes(range(256)) * 4)
    assert "HEIC" in fault("phone.heic", b"\0\0\0\x18ftypheic" + b"\0" * 64)
    assert "video" in fault("clip.mp4", b"\0\0\0\x18ftypisom" + b"\0" * 64)
    assert "PDF" in fault("a.pdf", b"%PDF-1.7\n")
    assert "SVG" in fault("a.svg", b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg'/>")
    assert "PostScript" in fault("a.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    assert "web page" in fault("a.jpg", b"<!DOCTYPE html><html>Log in</html>")
    assert "too few to learn from" in fault("pixel.gif", _bytes(Image.new("RGB", (1, 1)), "GIF"))


def _bytes(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "AVIF"])
@pytest.mark.parametrize("share", [0.1, 0.6, 0.9])
def test_truncated_images_are_refused(tmp_path: Path, kind: str, share: float) -> None:
    noise = Image.effect_noise((120, 120), 90).convert("RGB")
    data = _bytes(noise, kind)
    path = tmp_path / "a"
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(UserError, match=r"damaged or cut off|not an image"):
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


def test_huge_images_are_refused_with_their_size(tmp_path: Path) -> None:
    path = save(Image.new("1", (40, 20)), tmp_path / "a.png")
    start = path.read_bytes()[8:33]  # the PNG's first chunk, with width and height

    def huge(width: int, height: int) -> Path:
        header = start[:8] + width.to_bytes(4, "big") + height.to_bytes(4, "big") + start[16:21]
        file = tmp_path / f"{width}.png"
        checksum = zlib.crc32(header[4:]).to_bytes(4, "big")
        file.write_bytes(path.read_bytes()[:8] + header + checksum + path.read_bytes()[33:])
        return file

    with pytest.raises(UserError, match=r"too large \(20000×8000; at most 150 megapixels\)"):
        load_image(huge(20_000, 8_000), 32)
    with pytest.raises(UserError, match="too large"):
        load_image(huge(40_000, 40_000), 32)


def test_machine_faults_have_their_own_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(IMAGE, tmp_path / "a.png")

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


def test_tensors_are_in_minus_one_to_one() -> None:
    tensor = to_tensor(Image.new("RGB", (4, 2), (255, 0, 51)))
    assert tensor.shape == (3, 2, 4)
    assert tensor.dtype == torch.float32
    torch.testing.assert_close(tensor[:, 0, 0], torch.tensor([1.0, -1.0, -0.6]))


class TestMasks:
    def test_white_counts_and_the_crop_is_that_of_the_image(self, tmp_path: Path) -> None:
        mask = Image.new("L", (60, 40), 0)
        mask.paste(255, (30, 0, 60, 40))
        result = load_mask(save(mask, tmp_path / "m.png"), 4, IMAGE.size)
        assert result.shape == (1, 4, 4)
        assert result.dtype == torch.float32
        torch.testing.assert_close(result[0], torch.tensor([0.0, 0, 1, 1]).expand(4, 4))
        assert load_mask(tmp_path / "m.png", (2, 4)).shape == (1, 2, 4)

    def test_the_opaque_part_of_a_cutout_counts(self, tmp_path: Path) -> None:
        cut = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
        cut.paste((9, 9, 9, 255), (0, 0, 20, 40))
        result = load_mask(save(cut, tmp_path / "m.png"), 4)
        torch.testing.assert_close(result[0], torch.tensor([1.0, 1, 0, 0]).expand(4, 4))
        opaque = save(Image.new("RGBA", (40, 40), (255, 255, 255, 255)), tmp_path / "o.png")
        assert load_mask(opaque, 4).min() == 1

    def test_a_mask_of_the_same_shape_and_another_size_is_accepted(self, tmp_path: Path) -> None:
        mask = save(Image.new("L", (31, 20), 255), tmp_path / "m.png")
        assert load_mask(mask, 4, IMAGE.size).min() == 1

    def test_a_mask_of_another_shape_is_refused(self, tmp_path: Path) -> None:
        mask = save(Image.new("L", (60, 60), 255), tmp_path / "m.png")
        with pytest.raises(UserError, match="60×60 pixels, its image 60×40: make the mask the same size"):
            load_mask(mask, 4, IMAGE.size)

    def test_a_black_mask_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="paint the subject white"):
            load_mask(save(Image.new("L", (40, 40), 0), tmp_path / "m.png"), 4)

    def test_a_missing_mask_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"m\.png: no such image"):
            load_mask(tmp_path / "m.png", 4)


def test_no_file_stays_open(tmp_path: Path) -> None:
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("counts open files through /proc")
    path = save(IMAGE, tmp_path / "a.tiff")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        load_image(path, 32)
    assert len(os.listdir("/proc/self/fd")) == before
