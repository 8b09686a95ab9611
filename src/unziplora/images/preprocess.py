"""Pictures of any format and mode, as square RGB pictures and tensors."""

from __future__ import annotations

import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps
from torch import Tensor

from unziplora.errors import UserError
from unziplora.images.files import open_upright

_SQUARE_LOSS = 2.0


def load_image(path: Path, resolution: int) -> Image.Image:
    """Open a picture as RGB, `resolution` pixels wide and high.

    Turned as EXIF says, colors taken to sRGB, transparency on white, first frame of an animation, center
    crop, Lanczos. Warns where that loses something: animation, upscaling, much cropped away.

    Raises:
        UserError: missing, a folder, empty, truncated, too large, of another format, or no picture.
        MachineError: no permission, too little memory.
    """
    with open_upright(path, resolution) as (picture, (width, height)):
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
        UserError: as `load_image`; or the mask is black all over, or its shape is not that of the picture.
        MachineError: no permission, too little memory.
    """
    height, width = (size, size) if isinstance(size, int) else size
    with open_upright(path, 2 * max(height, width)) as (opened, shape):
        mask = _gray(opened)
    if picture is not None:
        with open_upright(picture, 1) as (_, other):
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
    """Colors from the picture's own profile (a phone's Display P3, a printer's CMYK) to sRGB."""
    if not profile or picture.mode not in ("RGB", "CMYK", "L"):
        return picture
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        converted = ImageCms.profileToProfile(picture, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):  # damaged, or of another mode than the picture
        return picture
    return converted or picture


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Gray of 16 or 32 bits, or floating point, to 8 bits: by its format's range, else by its maximum."""
    values = np.nan_to_num(np.asarray(picture, dtype=np.float64), posinf=0.0, neginf=0.0)
    top = float(values.max())
    if picture.mode == "F":
        full = 1.0 if top <= 1 else 255.0 if top <= 255 else top
    else:
        full = 65535.0 if top <= 65535 else top
    return Image.fromarray((values.clip(0) / full * 255).round().astype(np.uint8))


def _gray(picture: Image.Image) -> Image.Image:
    """A mask as 8-bit gray: its transparency where it has any, else its brightness."""
    if picture.has_transparency_data:
        alpha = picture.convert("RGBA").getchannel("A")
        if alpha.getextrema()[0] != 255:
            return alpha
    return _rgb(picture).convert("L")
