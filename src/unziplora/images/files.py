"""Image files of any format, opened upright. Every fault of a file has its own message."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import IO

from PIL import ExifTags, Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from unziplora.errors import MachineError, UserError, first_line
from unziplora.images.colors import to_rgb

FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "JPEG2000", "PPM", "TGA", "PSD")
"""Formats that are opened. Pillow reads more, but some start other programs (EPS) or contain no image."""

PNG_MODES = ("1", "L", "LA", "I", "I;16", "P", "RGB", "RGBA")
"""Modes that a PNG file can contain."""

PIXEL_LIMIT = 150_000_000
"""Largest number of pixels. 150 megapixels take 450 MB of memory, and no camera needs more."""

PROFILE_LIMIT = 2**26
"""Largest color profile of a PNG in bytes. Printers' profiles have a few million."""

Box = tuple[int, int, int, int]
"""Left, top, width and height in pixels."""

SMALLEST_SIDE = 8
"""Pixels below which an image is too thin to learn from: one pixel of SDXL's latents."""

_SIDEWAYS = range(5, 9)
"""EXIF orientations that swap width and height."""


def open_upright(
    path: Path,
    side: int,
    convert: Callable[[Image.Image], Image.Image] = lambda image: image,
    crop: Callable[[tuple[int, int]], Box] | None = None,
) -> tuple[Image.Image, tuple[int, int]]:
    """Open an image, turn it upright, and return it with its original size; warns if it has several frames or pages.

    Args:
        side: shorter side that the caller needs. A larger image may be reduced, to save memory.
        convert: conversion of the upright image. Its faults are reported as faults of the file.
        crop: returns the part to use, in pixels of the upright image, from that image's size.

    Raises:
        UserError: missing, a folder, empty, truncated, too large, too small, of another format, or not an image; or the
            crop is not inside it.
        MachineError: no permission, or not enough memory.
    """
    _check_file(path)
    try:
        with warnings.catch_warnings():
            # Pillow's own limit warns at 89 megapixels; ours is an error. Faults of EXIF data are harmless.
            warnings.filterwarnings("ignore", module="PIL")
            image, size, repeated = _read(path, None if crop else side)
            if crop:
                size = _turn_upright(image, size)
                image = _reduce(_cropped(path, image, crop(size)), side)
            else:
                image = _reduce(image, side)
                size = _turn_upright(image, size)
            image = convert(image)
    except (UserError, MachineError):
        raise
    except PermissionError:
        raise MachineError(f"{path}: no permission to read it") from None
    except Image.DecompressionBombError:
        raise UserError(_too_large(path, "more than 179 megapixels")) from None
    except MemoryError:
        raise MachineError(f"{path}: not enough memory to open it; reduce it to 2048 pixels") from None
    except UnidentifiedImageError:
        raise UserError(_unknown(path)) from None
    except Exception as error:  # Pillow's readers raise nearly anything on damaged files
        raise UserError(
            f"{path}: damaged or cut off, cannot be read as an image ({first_line(error)}); "
            "get it again, or open it in an image editor and save it as PNG"
        ) from None
    if repeated:
        warnings.warn(f"{path} has several {repeated}: only the first is used", stacklevel=3)
    return image, size


def as_png_keeps(image: Image.Image) -> Image.Image:
    """Return an image in memory as its file would be read: upright, and in RGB if PNG lacks its mode."""
    image = ImageOps.exif_transpose(image)
    if image.mode in PNG_MODES:
        return image
    converted = to_rgb(image)
    converted.info.pop("icc_profile", None)  # of the mode before
    return converted


def _read(path: Path, side: int | None) -> tuple[Image.Image, tuple[int, int], str | None]:
    """Read the first frame and its original size; name what the file contains several of, "frames" or "pages"."""
    # Not by its path: Pillow maps such TIFF files into memory, and garbles those that lie on their side.
    with path.open("rb") as file:
        try:
            return _load(path, file, side)
        except ValueError as error:
            if "MAX_TEXT" not in str(error) and "text chunks" not in str(error):
                raise
        file.seek(0)
        cleaned, profile = _without_long_texts(file)
        image, size, repeated = _load(path, cleaned, side)
        if profile:
            image.info["icc_profile"] = profile
        return image, size, repeated


def _load(path: Path, file: IO[bytes], side: int | None) -> tuple[Image.Image, tuple[int, int], str | None]:
    with Image.open(file, formats=FORMATS) as image:
        size = image.size
        _check_size(path, *size)
        jpeg = image.format in ("JPEG", "MPO")  # MPO: a phone's JPEG with a preview or a second eye behind it
        if jpeg and side:
            image.draft(None, (2 * side, 2 * side))
        repeated = None
        if not jpeg and image.format != "PSD" and getattr(image, "n_frames", 1) > 1:
            repeated = "pages" if image.format == "TIFF" else "frames"
        image.load()
        # Pillow turns TIFF files by itself while it loads them
        return image, size if jpeg else image.size, repeated


def _without_long_texts(file: IO[bytes]) -> tuple[IO[bytes], bytes | None]:
    """Copy a PNG without the texts that are too long for Pillow, such as workflows; return its color profile as well.

    Pillow limits decompressed texts and profiles, to be safe from bombs, and gives up the whole image.
    """
    copy, profile = BytesIO(file.read(8)), None
    copy.seek(8)
    texts = PngImagePlugin.PngStream(BytesIO())
    while head := file.read(8):
        kind, data = head[4:], file.read(int.from_bytes(head[:4], "big") + 4)
        if kind == b"iCCP":
            with suppress(zlib.error):
                unpacked = zlib.decompressobj()
                profile = unpacked.decompress(data[data.index(b"\0") + 2 : -4], PROFILE_LIMIT)
                profile = profile if unpacked.eof else None
        elif kind not in (b"tEXt", b"zTXt", b"iTXt") or _is_readable(texts, kind, data[:-4]):
            copy.write(head + data)
    copy.seek(0)
    return copy, profile


def _is_readable(texts: PngImagePlugin.PngStream, kind: bytes, data: bytes) -> bool:
    """Check whether Pillow reads a text of a PNG; its limit for all texts together counts those before."""
    texts.fp = BytesIO(data)
    try:
        getattr(texts, f"chunk_{kind.decode()}")(0, len(data))
    except (ValueError, SyntaxError):
        return False
    return True


def _cropped(path: Path, image: Image.Image, crop: Box) -> Image.Image:
    left, top, width, height = crop
    if left + width > image.width or top + height > image.height:
        raise UserError(
            f"crop {left},{top},{width},{height} is not inside {path}, which is {image.width}×{image.height} pixels "
            "upright: give left, top, width and height of the part to use"
        )
    _check_size(path, width, height)
    return image.crop((left, top, left + width, top + height))


def _turn_upright(image: Image.Image, size: tuple[int, int]) -> tuple[int, int]:
    """Turn an image in place according to its EXIF data, and return its original size, swapped if it was sideways."""
    with suppress(Exception):  # damaged EXIF data: the image itself is fine
        if image.getexif().get(ExifTags.Base.Orientation) in _SIDEWAYS:
            size = size[::-1]
        ImageOps.exif_transpose(image, in_place=True)
    return size


def _reduce(image: Image.Image, side: int) -> Image.Image:
    """Average an image of many megapixels down to no less than twice the side."""
    factor = min(image.size) // (2 * side)
    averageable = image.mode in ("L", "LA", "RGB", "RGBA", "CMYK") and "transparency" not in image.info
    return image.reduce(factor) if averageable and factor > 1 else image


def _check_file(path: Path) -> None:
    try:
        if path.is_dir():
            raise UserError(f"{path} is a folder: name an image in it")
        if not path.exists():
            if path.parts[:1] in (("http:",), ("https:",)):
                raise UserError(f"{path.name}: images are not fetched from the web; save it, and name the file")
            raise UserError(f"{path}: no such image")
        if not path.is_file():  # a pipe or device could be read forever
            raise UserError(f"{path}: this is not a file; name an image")
        if path.stat().st_size == 0:
            raise UserError(f"{path}: the file is empty; get it again")
    except OSError as error:  # such as a name that is too long, or a folder that may not be entered
        raise MachineError(f"{path}: cannot be read ({error.strerror or error})") from None


def _check_size(path: Path, width: int, height: int) -> None:
    if width * height > PIXEL_LIMIT:
        raise UserError(_too_large(path, f"{width}×{height}"))
    if min(width, height) < SMALLEST_SIDE:
        raise UserError(f"{path}: {width}×{height} pixels are too few to learn from; use a larger image")


def _too_large(path: Path, size: str) -> str:
    return (
        f"{path}: too large ({size}; at most {PIXEL_LIMIT // 1_000_000} megapixels): reduce it, 2048 pixels are plenty"
    )


_DAMAGED = "damaged"
_SIGNATURES = (
    (0, b"\xff\xd8\xff", _DAMAGED),
    (0, b"\x89PNG", _DAMAGED),
    (0, b"GIF8", _DAMAGED),
    (8, b"WEBP", _DAMAGED),
    (4, b"ftypavif", _DAMAGED),
    (4, b"ftypheic", "HEIC"),
    (4, b"ftypheix", "HEIC"),
    (4, b"ftypmif1", "HEIC"),
    (4, b"ftyp", "video"),
    (0, b"\x1aE\xdf\xa3", "video"),
    (0, b"%PDF", "PDF"),
    (0, b"%!PS", "PostScript"),
    (0, b"\xff\x0a", "JPEG XL"),
    (4, b"JXL ", "JPEG XL"),
    (0, b"PK\x03\x04", "archive or document"),
)


def _unknown(path: Path) -> str:
    """Explain why a file cannot be opened, by its first bytes."""
    with path.open("rb") as file:
        start = file.read(512)
    kind = next((name for offset, mark, name in _SIGNATURES if start[offset:].startswith(mark)), None)
    if kind is None and b"<svg" in start.lower():
        kind = "SVG"
    if kind is None and start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return f"{path}: a web page, not an image; save the image itself"
    if kind == _DAMAGED:
        return f"{path}: damaged or cut off, cannot be read as an image; get it again"
    reason = f"{kind} files cannot be read" if kind else "not an image, or of a format that cannot be read"
    return f"{path}: {reason}; export it as PNG or JPEG"
