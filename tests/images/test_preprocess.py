"""Images of every kind, and files of every kind that are not images."""

import os
import re
import struct
import warnings
import zlib
from contextlib import nullcontext
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageOps, PngImagePlugin

from unziplora.errors import MachineError, UserError
from unziplora.images.files import open_upright
from unziplora.images.preprocess import ImageFile, Size, TrainingImage, load_image, load_images, to_tensor

pytestmark = pytest.mark.filterwarnings("ignore:.* is cut off")

# left half red, right half blue, 60 wide and 40 high
IMAGE = Image.new("RGB", (60, 40), (200, 30, 30))
IMAGE.paste((30, 30, 200), (30, 0, 60, 40))


def save(image: Image.Image, path: Path, **options: object) -> Path:
    image.save(path, **options)
    return path


def masked(image: Path, mask: Path, size: Size) -> torch.Tensor:
    (loaded,) = load_images([ImageFile(image, mask)], [size])
    assert loaded.mask is not None
    return loaded.mask


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
        image = load_image(path, (48, 32))
    assert image.mode == "RGB"
    assert image.size == (48, 32)
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
    assert masked(path, path, (8, 8)).shape == (1, 8, 8)


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


class TestPngTexts:
    """PNG files whose texts or profiles are longer than Pillow reads."""

    def test_a_long_workflow_is_skipped_and_short_texts_are_read(self, tmp_path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6
        texts = PngImagePlugin.PngInfo()
        xmp = '<x:xmpmeta xmlns:x="adobe:ns:meta/" tiff:Orientation="6"></x:xmpmeta>'
        texts.add_itxt("XML:com.adobe.xmp", xmp, zip=True)
        texts.add_text("workflow", "x" * 2**21, zip=True)
        texts.add_itxt("prompt", "y" * 2**21, zip=True)
        path = save(IMAGE.transpose(TURNS[6]), tmp_path / "a.png", pnginfo=texts)
        assert_red_and_blue(load_image(path, (48, 32)))

    @pytest.mark.parametrize("after", [False, True])
    def test_the_total_of_many_texts_is_no_limit(self, tmp_path: Path, after: bool) -> None:
        texts = PngImagePlugin.PngInfo()
        for number in range(70):
            texts.add(b"zTXt", f"t{number}".encode() + b"\0\0" + zlib.compress(bytes(2**20)), after_idat=after)
        assert_red_and_blue(load_image(save(IMAGE, tmp_path / "a.png", pnginfo=texts), (48, 32)))

    def test_a_long_profile_counts(self, tmp_path: Path) -> None:
        long = _gray_profile(1.0) + bytes(2**21)
        path = save(Image.new("L", (40, 40), 128), tmp_path / "a.png", icc_profile=long)
        assert load_image(path, 32).getpixel((5, 5)) == (188, 188, 188)

    def test_bombs_are_not_unpacked(self, tmp_path: Path) -> None:
        bomb = zlib.compressobj(9)
        packed = b"".join(bomb.compress(bytes(2**24)) for _ in range(8)) + bomb.flush()
        texts = PngImagePlugin.PngInfo()
        texts.add(b"zTXt", b"comment\0\0" + packed)
        texts.add(b"iCCP", b"profile\0\0" + packed)
        assert_red_and_blue(load_image(save(IMAGE, tmp_path / "a.png", pnginfo=texts), (48, 32)))

    def test_a_truncated_file_with_a_long_text_is_still_damaged(self, tmp_path: Path) -> None:
        texts = PngImagePlugin.PngInfo()
        texts.add_text("workflow", "x" * 2**21, zip=True)
        path = save(Image.effect_noise((120, 120), 90), tmp_path / "a.png", pnginfo=texts)
        path.write_bytes(path.read_bytes()[:-3000])
        with pytest.raises(UserError, match="damaged or cut off"):
            load_image(path, 32)


class TestGrayProfiles:
    """Linear gray: a stored 128 is 188 in sRGB."""

    @pytest.mark.parametrize(
        ("mode", "suffix"),
        [("L", "png"), ("L", "jpg"), ("L", "tiff"), ("LA", "png"), ("I;16", "png"), ("I;16", "tiff")],
    )
    def test_they_are_converted_in_every_mode(self, tmp_path: Path, mode: str, suffix: str) -> None:
        image = Image.new(mode, (40, 40), {"L": 128, "LA": (128, 255), "I;16": 128 * 257}[mode])
        path = save(image, tmp_path / f"a.{suffix}", icc_profile=_gray_profile(1.0))
        assert load_image(path, 32).getpixel((5, 5)) == pytest.approx((188, 188, 188), abs=1)

    def test_transparency_is_put_on_white_after_the_conversion(self, tmp_path: Path) -> None:
        image = Image.new("LA", (40, 40), (128, 0))
        path = save(image, tmp_path / "a.png", icc_profile=_gray_profile(1.0))
        assert load_image(path, 32).getpixel((5, 5)) == (255, 255, 255)

    def test_profiles_of_colors_count_for_gray_too(self, tmp_path: Path) -> None:
        srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
        path = save(Image.new("L", (40, 40), 128), tmp_path / "a.png", icc_profile=srgb)
        assert load_image(path, 32).getpixel((5, 5)) == pytest.approx((128, 128, 128), abs=1)

    def test_profiles_of_another_kind_are_ignored(self, tmp_path: Path) -> None:
        path = save(IMAGE, tmp_path / "a.png", icc_profile=_gray_profile(1.0))
        assert_red_and_blue(load_image(path, (48, 32)), 3)


def _gray_profile(gamma: float) -> bytes:
    """Return an ICC profile of gray with a gamma."""
    white = struct.pack(">iii", 63190, 65536, 54061)  # D50
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", 5) + b"gray\0" + bytes(78),
        b"cprt": b"text\0\0\0\0none\0\0\0\0",
        b"wtpt": b"XYZ \0\0\0\0" + white,
        b"kTRC": b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0",
    }
    table, body = struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        table += name + struct.pack(">II", 128 + 4 + 12 * len(tags) + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    head = struct.pack(">I", 128 + len(table) + len(body)) + b"lcms\x02\x10\0\0mntrGRAYXYZ " + bytes(12) + b"acsp"
    return head.ljust(68, b"\0") + white + bytes(128 - 80) + table + body


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tiff"])
def test_first_frame_of_an_animation_is_used_with_a_warning(tmp_path: Path, suffix: str) -> None:
    other = Image.new("RGB", IMAGE.size, "lime")
    path = save(IMAGE, tmp_path / f"a.{suffix}", save_all=True, append_images=[other], duration=100)
    with pytest.warns(UserWarning, match="only the first is used") as caught:
        image = load_image(path, (48, 32))
    assert len(caught) == 1
    assert_red_and_blue(image, 20)


@pytest.mark.parametrize(
    ("images", "side", "message"),
    [
        ([Image.new("RGB", (200, 40))], 32, "80% of .* is cut off at the left and right"),
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


@pytest.mark.parametrize("kind", [ValueError, OSError, PermissionError, MemoryError, UserWarning, KeyboardInterrupt])
def test_faults_after_the_reading_are_not_faults_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[BaseException]
) -> None:
    path = save(IMAGE, tmp_path / "a.png")

    def fit(*_: object, **__: object) -> Image.Image:
        raise kind("elsewhere")

    monkeypatch.setattr(ImageOps, "fit", fit)
    with pytest.raises(kind, match="elsewhere"):
        load_image(path, 32)


def test_a_fault_of_the_conversion_is_one_of_the_file(tmp_path: Path) -> None:
    def convert(image: Image.Image) -> Image.Image:
        raise ValueError("bad palette")

    with pytest.raises(UserError, match=r"a\.png: damaged or cut off, .* \(bad palette\)"):
        open_upright(save(IMAGE, tmp_path / "a.png"), 32, convert)


def test_each_image_and_mask_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [save(IMAGE, tmp_path / f"{n}.png") for n in range(2)]
    opened: list[Path] = []
    read = Image.open
    monkeypatch.setattr(
        Image, "open", lambda file, **options: (opened.append(Path(file.name)), read(file, **options))[1]
    )
    load_images([ImageFile(images[0], images[0]), ImageFile(images[1])], [(32, 32), (48, 32)])
    assert opened == [images[0], images[0], images[1]]


def test_small_images_are_enlarged_with_a_warning(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="only 60×40 pixels and was enlarged to 64×64"):
        assert load_image(save(IMAGE, tmp_path / "a.png"), 64).size == (64, 64)


@pytest.mark.parametrize(
    ("stored", "size", "message"),
    [
        ((200, 40), (32, 32), r"80% of .*a\.png \(200×40\) is cut off at the left and right to make it 32×32"),
        ((768, 1344), (96, 96), "43% of .* is cut off at the top and bottom"),
        ((1600, 900), (96, 96), "44% of .*; choose the part with --crop X,Y,W,H, or keep all of it with --fit pad"),
        ((100, 96), (96, 96), None),
        ((768, 1344), (96, 168), None),
    ],
)
def test_what_is_cut_off_is_named_with_its_share(tmp_path: Path, stored: Size, size: Size, message: str | None) -> None:
    path = save(Image.new("RGB", stored), tmp_path / "a.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=message) if message else nullcontext():
            assert load_image(path, size).size == size


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
    with pytest.raises(UserError, match=r"^cat\.png: images are not fetched from the web"):
        load_image(Path("https://example.org/cat.png"), 32)
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
        image, mask = save(IMAGE, tmp_path / "a.png"), Image.new("L", (60, 40), 0)
        mask.paste(255, (15, 0, 45, 40))
        path = save(mask, tmp_path / "m.png")
        assert masked(image, path, (8, 8)).dtype == torch.float32
        expected = torch.tensor([0.0, 1, 1, 1, 1, 1, 1, 0]).expand(1, 8, 8)
        torch.testing.assert_close(masked(image, path, (8, 8)), expected)
        assert masked(image, path, (12, 8)).shape == (1, 8, 12)

    def test_the_opaque_part_of_a_cutout_counts(self, tmp_path: Path) -> None:
        cut = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
        cut.paste((9, 9, 9, 255), (0, 0, 20, 40))
        path = save(cut, tmp_path / "m.png")
        torch.testing.assert_close(masked(path, path, (4, 4))[0], torch.tensor([1.0, 1, 0, 0]).expand(4, 4))
        opaque = save(Image.new("RGBA", (40, 40), (255, 255, 255, 255)), tmp_path / "o.png")
        assert masked(path, opaque, (4, 4)).min() == 1

    @pytest.mark.parametrize(
        ("size", "level", "message"),
        [
            ((31, 20), 255, None),
            ((60, 60), 255, "60×60 pixels, its image 60×40: make the mask the same size"),
            ((60, 40), 0, "paint the subject white"),
        ],
    )
    def test_masks_of_another_shape_and_black_ones_are_refused(
        self, tmp_path: Path, size: Size, level: int, message: str | None
    ) -> None:
        image, mask = save(IMAGE, tmp_path / "a.png"), save(Image.new("L", size, level), tmp_path / "m.png")
        with pytest.raises(UserError, match=message) if message else nullcontext():
            assert masked(image, mask, (4, 4)).min() == 1

    def test_a_missing_mask_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"m\.png: no such image"):
            masked(save(IMAGE, tmp_path / "a.png"), tmp_path / "m.png", (4, 4))

    @pytest.mark.parametrize("left", [0, 100, 250])
    def test_the_crop_goes_to_the_subject(self, tmp_path: Path, left: int) -> None:
        image, mask = Image.new("RGB", (300, 100), "black"), Image.new("L", (300, 100), 0)
        image.paste("white", (left, 20, left + 50, 80))
        mask.paste(255, (left, 20, left + 50, 80))
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # two thirds are cut off, but nothing of the subject
            path = save(image, tmp_path / "a.png")
            (loaded,) = load_images([ImageFile(path, save(mask, tmp_path / "m.png"))], [(100, 100)])
        start = {0: 0, 100: 25, 250: 50}[left]  # in the middle, as far as the image allows
        np.testing.assert_array_equal(np.asarray(loaded.image)[50, start : start + 50], 255)
        assert np.asarray(loaded.image).mean() == pytest.approx(0.3 * 255, rel=0.01)
        assert loaded.sizes == (100, 300, 0, left - start, 100, 100)

    def test_a_subject_that_is_cut_is_named_with_its_share(self, tmp_path: Path) -> None:
        path = save(Image.new("RGB", (300, 100), "white"), tmp_path / "a.png")
        (loaded,) = load_images([ImageFile(path, path)], [(100, 100)])
        assert re.match("67% of the subject in .* is cut off", str(*loaded.flaws))


class TestProportions:
    """The training size of several, its part of the image, and SDXL's size conditioning."""

    SIZES = ((64, 64), (80, 48), (48, 80))

    def load(self, folder: Path, *stored: Size, **options: Any) -> list[TrainingImage]:
        files = [ImageFile(save(_ramp(size), folder / f"{n}.png")) for n, size in enumerate(stored)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return load_images(files, self.SIZES, **options)

    @pytest.mark.parametrize(
        ("stored", "size", "sizes"),
        [
            ((640, 640), (64, 64), (64, 64, 0, 0, 64, 64)),
            ((160, 96), (80, 48), (48, 80, 0, 0, 48, 80)),
            ((96, 160), (48, 80), (80, 48, 0, 0, 80, 48)),
            ((200, 100), (80, 48), (48, 96, 0, 8, 48, 80)),
            ((100, 200), (48, 80), (96, 48, 8, 0, 80, 48)),
            ((50, 100), (48, 80), (96, 48, 8, 0, 80, 48)),
        ],
    )
    def test_an_image_gets_the_nearest(self, tmp_path: Path, stored: Size, size: Size, sizes: tuple[int, ...]) -> None:
        (image,) = self.load(tmp_path, stored)
        assert (image.image.size, image.sizes) == (size, sizes)

    def test_several_images_share_the_size_that_cuts_off_least(self, tmp_path: Path) -> None:
        one, two, three = self.load(tmp_path, (200, 100), (160, 96), (64, 64))
        assert one.image.size == two.image.size == three.image.size == (80, 48)
        assert self.load(tmp_path, (160, 96), (96, 160))[0].image.size == (64, 64)

    def test_a_crop_may_count_as_the_whole_image(self, tmp_path: Path) -> None:
        (image,) = self.load(tmp_path, (200, 100), uncropped=True)
        assert image.sizes == (48, 80, 0, 0, 48, 80)

    def test_the_whole_image_is_padded_with_white_that_does_not_count(self, tmp_path: Path) -> None:
        path = save(Image.new("RGB", (120, 60), "black"), tmp_path / "a.png")
        (image,) = load_images([ImageFile(path)], [(64, 64)], whole=True)
        rows = np.asarray(image.image)[:, 32, 0]
        assert rows.tolist() == [255] * 16 + [0] * 32 + [255] * 16
        assert image.inside is not None
        assert image.inside[0, :, 32].tolist() == [0.0] * 16 + [1.0] * 32 + [0.0] * 16
        assert image.sizes == (64, 64, 0, 0, 64, 64)
        square = save(Image.new("RGB", (80, 80), "black"), tmp_path / "b.png")
        assert load_images([ImageFile(square)], [(64, 64)], whole=True)[0].inside is None

    @pytest.mark.parametrize("size", [(6400, 64), (64, 6400)])
    def test_a_strip_that_would_become_too_thin_is_refused(self, tmp_path: Path, size: Size) -> None:
        strip = [ImageFile(save(Image.new("RGB", size, "black"), tmp_path / "a.png"))]
        with pytest.raises(UserError, match=r"thinner than 8 pixels .* 64×64: choose a part with --crop"):
            load_images(strip, [(64, 64)], whole=True)
        assert load_images(strip, [(64, 64)])[0].image.size == (64, 64)

    def test_a_mask_is_padded_like_its_image(self, tmp_path: Path) -> None:
        mask = Image.new("L", (120, 60), 0)
        mask.paste(255, (0, 0, 60, 60))
        image = ImageFile(save(Image.new("RGB", (120, 60)), tmp_path / "a.png"), save(mask, tmp_path / "m.png"))
        (loaded,) = load_images([image], [(64, 64)], whole=True)
        assert loaded.mask is not None
        np.testing.assert_array_equal(loaded.mask[0, :, 8], [0.0] * 16 + [1.0] * 32 + [0.0] * 16)
        assert loaded.mask[0, :, 40].max() == 0


class TestCrop:
    """The part of an image that the user chose."""

    @pytest.mark.parametrize("orientation", [1, 3, 6])
    def test_it_is_in_pixels_of_the_upright_image(self, tmp_path: Path, orientation: int) -> None:
        upright = _ramp((300, 200))
        turned = upright.transpose(TURNS[orientation]) if orientation in TURNS else upright
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = save(turned, tmp_path / "a.png", exif=exif)
        (image,) = load_images([ImageFile(path, crop=(100, 40, 80, 80))], [(80, 80)])
        assert image.image.tobytes() == upright.crop((100, 40, 180, 120)).tobytes()
        assert image.sizes == (80, 80, 0, 0, 80, 80)

    def test_it_is_as_sharp_as_the_original_allows(self, tmp_path: Path) -> None:
        large = Image.effect_noise((2000, 2000), 90).convert("RGB")
        path = save(large, tmp_path / "a.jpg", quality=95)
        (image,) = load_images([ImageFile(path, crop=(1000, 1000, 64, 64))], [(64, 64)])
        np.testing.assert_allclose(image.image, large.crop((1000, 1000, 1064, 1064)), atol=20)

    def test_the_mask_is_cropped_alike_whatever_its_size(self, tmp_path: Path) -> None:
        path = save(_ramp((300, 200)), tmp_path / "a.png")
        for scale in (1, 2):
            mask = Image.new("L", (300 * scale, 200 * scale), 0)
            mask.paste(255, (100 * scale, 0, 140 * scale, 200 * scale))
            file = ImageFile(path, save(mask, tmp_path / f"{scale}.png"), (100, 40, 80, 80))
            (image,) = load_images([file], [(8, 8)])
            assert image.mask is not None
            torch.testing.assert_close(image.mask[0], torch.tensor([1.0] * 4 + [0.0] * 4).expand(8, 8))

    @pytest.mark.parametrize("crop", [(250, 0, 80, 80), (0, 150, 80, 80), (0, 0, 4, 4)])
    def test_one_outside_the_image_or_too_small_is_refused(
        self, tmp_path: Path, crop: tuple[int, int, int, int]
    ) -> None:
        path = save(_ramp((300, 200)), tmp_path / "a.png")
        with pytest.raises(UserError, match=r"is not inside .*a\.png, which is 300×200|4×4 pixels are too few"):
            load_images([ImageFile(path, crop=crop)], [(64, 64)])


def _ramp(size: Size) -> Image.Image:
    red, green = (Image.linear_gradient("L").rotate(angle).resize(size) for angle in (0, 90))
    return Image.merge("RGB", (red, green, red))


def test_no_file_stays_open(tmp_path: Path) -> None:
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("counts open files through /proc")
    path = save(IMAGE, tmp_path / "a.tiff")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        load_image(path, 32)
    assert len(os.listdir("/proc/self/fd")) == before
