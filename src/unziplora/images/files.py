"""Picture files: opened upright, whatever their format; every fault of a file has its message."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from unziplora.errors import MachineError, UserError, first_line

FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "JPEG2000", "PPM", "TGA", "PSD")
"""What is opened. Pillow knows more, but some of those start other programs (EPS) or hold no picture."""

PIXEL_LIMIT = 150_000_000
"""Larger pictures are refused: 150 megapixels are 450 MB in memory, more than any camera's picture needs."""

_TINY = 8
_TURN = Image.Transpose
_TURNS = {
    2: _TURN.FLIP_LEFT_RIGHT,
    3: _TURN.ROTATE_180,
    4: _TURN.FLIP_TOP_BOTTOM,
    5: _TURN.TRANSPOSE,
    6: _TURN.ROTATE_270,
    7: _TURN.TRANSVERSE,
    8: _TURN.ROTATE_90,
}
"""What EXIF's orientation asks for."""
_KEEP_SHAPE = (_TURN.FLIP_LEFT_RIGHT, _TURN.ROTATE_180, _TURN.FLIP_TOP_BOTTOM)


@contextmanager
def open_upright(path: Path, side: int) -> Iterator[tuple[Image.Image, tuple[int, int]]]:
    """Open a picture, turned upright, with its original width and height; every fault gets its message.

    Args:
        side: shorter side that is wanted at least: a larger picture may come reduced, to save memory.

    Raises:
        UserError: missing, a folder, empty, truncated, too large, too small, of another format, or no picture.
        MachineError: no permission, too little memory.
    """
    _check_file(path)
    try:
        with warnings.catch_warnings():
            # Pillow's own limit warns at 89 megapixels; ours is an error. Faults of EXIF data are harmless.
            warnings.filterwarnings("ignore", module="PIL")
            picture, size, several = _read(path, side)
            turn = _TURNS.get(_orientation(picture))
        if several:
            warnings.warn(f"{path} has several {several}: only the first is used", stacklevel=4)
        upright = _reduced(picture, side)
        if turn is not None:
            upright = upright.transpose(turn)
            size = size if turn in _KEEP_SHAPE else size[::-1]
        yield upright, size
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
            f"{path}: damaged or cut off, cannot be read as a picture ({first_line(error)}); "
            "get it again, or open it in an image editor and save it as PNG"
        ) from None


def _read(path: Path, side: int) -> tuple[Image.Image, tuple[int, int], str | None]:
    """The first frame, its original size, and what there are several of: 'frames', 'pages' or nothing."""
    with Image.open(path, formats=FORMATS) as picture:
        size = picture.size
        _check_size(path, *size)
        jpeg = picture.format in ("JPEG", "MPO")  # MPO: a phone's JPEG with a preview or a second eye behind it
        if jpeg:
            picture.draft(None, (2 * side, 2 * side))
        several = None
        if not jpeg and picture.format != "PSD" and getattr(picture, "n_frames", 1) > 1:
            several = "pages" if picture.format == "TIFF" else "frames"
        picture.load()
        # Pillow turns TIFF files by itself while it loads them
        return picture, size if jpeg else picture.size, several


def _check_file(path: Path) -> None:
    try:
        if path.is_dir():
            raise UserError(f"{path} is a folder: name the picture in it")
        if not path.exists():
            raise UserError(f"{path}: no such picture")
        if path.stat().st_size == 0:
            raise UserError(f"{path}: the file is empty; get it again")
    except OSError as error:  # such as a name that is too long, or a folder that may not be entered
        raise MachineError(f"{path}: cannot be read ({error.strerror or error})") from None


def _check_size(path: Path, width: int, height: int) -> None:
    if width * height > PIXEL_LIMIT:
        raise UserError(_too_large(path, f"{width}×{height}"))
    if min(width, height) < _TINY:
        raise UserError(f"{path}: {width}×{height} pixels are no picture to learn from; take a larger one")


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
    """Why a file is not opened: what it is, as far as its first bytes tell."""
    with path.open("rb") as file:
        start = file.read(512)
    kind = next((name for at, mark, name in _SIGNATURES if start[at:].startswith(mark)), None)
    if kind is None and b"<svg" in start.lower():
        kind = "SVG"
    if kind is None and start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return f"{path}: a web page, not a picture; save the picture itself"
    if kind == _DAMAGED:
        return f"{path}: damaged or cut off, cannot be read as a picture; get it again"
    what = f"{kind} files are not read" if kind else "not a picture, or of a format that is not read"
    return f"{path}: {what}; export it as PNG or JPEG"


def _orientation(picture: Image.Image) -> int:
    try:
        value = picture.getexif().get(0x0112, 1)
    except Exception:  # damaged EXIF data: the picture itself is fine
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _reduced(picture: Image.Image, side: int) -> Image.Image:
    """A picture of many megapixels averaged down to no less than twice the wanted side."""
    factor = min(picture.size) // (2 * side)
    plain = picture.mode in ("L", "LA", "RGB", "RGBA", "CMYK") and "transparency" not in picture.info
    return picture.reduce(factor) if plain and factor > 1 else picture
