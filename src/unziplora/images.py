"""Pictures from disk, whatever their format and mode, as square RGB pictures and tensors."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from torch import Tensor

from unziplora.errors import MachineError, UserError, first_line

FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "JPEG2000", "PPM", "TGA", "PSD")
"""What is opened. Pillow knows more, but some of those start other programs (EPS) or hold no picture."""

PIXEL_LIMIT = 150_000_000
"""Larger pictures are refused: 150 megapixels are 450 MB in memory, more than any camera's picture needs."""

_SQUARE_LOSS = 2.0
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


def load_picture(path: Path, resolution: int) -> Image.Image:
    """Open a picture as RGB, `resolution` pixels wide and high.

    Turned as EXIF says, colours taken to sRGB, transparency on white, first frame of an animation, centre
    crop, Lanczos. Warns where that loses something: animation, upscaling, much cropped away.

    Raises:
        UserError: missing, a folder, empty, truncated, too large, of another format, or no picture.
        MachineError: no permission, too little memory.
    """
    with _opened(path, resolution) as (picture, (width, height)):
        picture = _rgb(picture)
        if min(width, height) < resolution:
            warnings.warn(
                f"{path} is only {width}×{height} pixels and was enlarged to {resolution}×{resolution}; "
                "a larger original gives sharper results",
                stacklevel=2,
            )
        if max(width, height) > _SQUARE_LOSS * min(width, height):
            warnings.warn(
                f"{path} is {width}×{height}: only the square in its middle is used; crop it yourself "
                "if the subject is elsewhere",
                stacklevel=2,
            )
        return ImageOps.fit(picture, (resolution, resolution), Image.Resampling.LANCZOS)


def to_tensor(picture: Image.Image) -> Tensor:
    """An RGB picture as a tensor [3, H, W] in −1…1."""
    values = torch.from_numpy(np.array(picture.convert("RGB"), dtype=np.float32))
    return values.permute(2, 0, 1) / 127.5 - 1


def load_mask(path: Path, size: int | tuple[int, int], picture: Path | None = None) -> Tensor:
    """Open a subject mask as a tensor [1, h, w] in 0…1, cropped to the square like its picture.

    White counts, black does not. Of a cut-out (a picture with transparent parts) the opaque part counts.

    Args:
        path: any picture file.
        size: height and width of the result, or its side.
        picture: the picture that the mask belongs to; its shape must be the same.

    Raises:
        UserError: as `load_picture`; or the mask is black all over, or its shape is not that of the picture.
        MachineError: no permission, too little memory.
    """
    height, width = (size, size) if isinstance(size, int) else size
    with _opened(path, 2 * max(height, width)) as (opened, shape):
        mask = _grey(opened)
    if picture is not None:
        with _opened(picture, 1) as (_, other):
            pass
        # a mask of another size but the same shape will do, give or take a pixel of rounding
        if abs(shape[0] * other[1] - shape[1] * other[0]) > max(*shape, *other):
            raise UserError(
                f"mask {path} is {shape[0]}×{shape[1]} pixels, its picture {picture} {other[0]}×{other[1]}: "
                "make the mask the same size as the picture"
            )
    values = np.array(ImageOps.fit(mask, (width, height), Image.Resampling.BOX), dtype=np.float32) / 255
    if not values.any():
        raise UserError(f"mask {path} is black where the picture is used: paint the subject white")
    return torch.from_numpy(values)[None]


@contextmanager
def _opened(path: Path, side: int) -> Iterator[tuple[Image.Image, tuple[int, int]]]:
    """Open a picture, turned upright, with its original width and height; every fault gets its message.

    Args:
        side: shorter side that is wanted at least: a larger picture may come reduced, to save memory.
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


def _rgb(picture: Image.Image) -> Image.Image:
    """Any mode to RGB in sRGB, transparency on white."""
    if picture.mode in ("I", "F") or picture.mode.startswith("I;"):
        return _eight_bits(picture).convert("RGB")
    profile = picture.info.get("icc_profile")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        white.alpha_composite(picture)
        picture = white.convert("RGB")
    elif picture.mode == "P":
        picture = picture.convert("RGB")
    return _to_srgb(picture, profile).convert("RGB")


def _to_srgb(picture: Image.Image, profile: bytes | None) -> Image.Image:
    """Colours from the picture's own profile (a phone's Display P3, a printer's CMYK) to sRGB."""
    if not profile or picture.mode not in ("RGB", "CMYK", "L"):
        return picture
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        converted = ImageCms.profileToProfile(picture, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):  # damaged, or of another mode than the picture
        return picture
    return converted or picture


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits, or floating point, to 8 bits: by its format's range, else by its maximum."""
    values = np.nan_to_num(np.asarray(picture, dtype=np.float64), posinf=0.0, neginf=0.0)
    top = float(values.max())
    if picture.mode == "F":
        full = 1.0 if top <= 1 else 255.0 if top <= 255 else top
    else:
        full = 65535.0 if top <= 65535 else top
    return Image.fromarray((values.clip(0) / full * 255).round().astype(np.uint8))


def _grey(picture: Image.Image) -> Image.Image:
    """A mask as 8-bit grey: its transparency where it has any, else its brightness."""
    if picture.has_transparency_data:
        alpha = picture.convert("RGBA").getchannel("A")
        if alpha.getextrema()[0] != 255:
            return alpha
    return _rgb(picture).convert("L")
