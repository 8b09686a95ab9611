"""Images of any format and mode, as square RGB images and tensors."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from io import BytesIO
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps
from torch import Tensor

from unziplora.errors import UserError
from unziplora.images.files import open_upright

_ASPECT_LIMIT = 2.0
"""Ratio of the sides above which the square crop loses so much that it warns."""


def load_image(path: Path, resolution: int) -> Image.Image:
    """Open an image as RGB, `resolution` pixels wide and high.

    Turns it by its EXIF data, converts colors to sRGB, puts transparency on white, and takes the first frame of an
    animation and the square in the middle (Lanczos). Warns where that loses something: animation, upscaling, or a
    crop of more than half.

    Raises:
        UserError: missing, a folder, empty, truncated, too large, of another format, or not an image.
        MachineError: no permission, or not enough memory.
    """
    return _load(path, resolution)[0]


def check_images(images: Sequence[Path], masks: Sequence[Path], resolution: int) -> None:
    """Open each image and its mask once, to refuse those that cannot be learned from.

    Raises:
        UserError: as `load_image` and `load_mask`.
        MachineError: no permission, or not enough memory.
    """
    for path, mask in zip_longest(images, masks[: len(images)]):
        _, size = _load(path, resolution)
        if mask is not None:
            load_mask(mask, resolution, size)


def to_tensor(image: Image.Image) -> Tensor:
    """Convert an RGB image to a tensor [3, H, W] in −1…1."""
    values = torch.from_numpy(np.array(image.convert("RGB"), dtype=np.float32))
    return values.permute(2, 0, 1) / 127.5 - 1


def load_mask(path: Path, size: int | tuple[int, int], image_size: tuple[int, int] | None = None) -> Tensor:
    """Open a subject mask as a tensor [1, h, w] in 0…1, cropped to the square like its image.

    White counts, black does not. In a cutout (an image with transparent parts) the opaque part counts.

    Args:
        path: any image file.
        size: height and width of the result, or its side.
        image_size: original width and height of the image that the mask belongs to. The shapes must be the same.

    Raises:
        UserError: as `load_image`; or the mask is black all over, or its shape is not that of the image.
        MachineError: no permission, or not enough memory.
    """
    height, width = (size, size) if isinstance(size, int) else size
    mask, mask_size = open_upright(path, 2 * max(height, width), _to_gray)
    if image_size is not None:
        # a mask of another size but the same shape will do, give or take a pixel of rounding
        difference = abs(mask_size[0] * image_size[1] - mask_size[1] * image_size[0])
        if difference > max(*mask_size, *image_size):
            raise UserError(
                f"mask {path} is {mask_size[0]}×{mask_size[1]} pixels, its image {image_size[0]}×{image_size[1]}: "
                "make the mask the same size as the image"
            )
    values = np.array(ImageOps.fit(mask, (width, height), Image.Resampling.BOX), dtype=np.float32) / 255
    if not values.any():
        raise UserError(f"mask {path} is black where the image is used: paint the subject white")
    return torch.from_numpy(values)[None]


def _load(path: Path, resolution: int) -> tuple[Image.Image, tuple[int, int]]:
    """Open an image as an RGB square, and return it with its original width and height."""
    image, (width, height) = open_upright(path, resolution, _to_rgb)
    if min(width, height) < resolution:
        warnings.warn(
            f"{path} is only {width}×{height} pixels and was enlarged to {resolution}×{resolution}; "
            "a larger original gives sharper results",
            stacklevel=3,
        )
    if max(width, height) > _ASPECT_LIMIT * min(width, height):
        warnings.warn(
            f"{path} is {width}×{height}: only the square in its middle is used; crop it yourself "
            "if the subject is elsewhere",
            stacklevel=3,
        )
    return ImageOps.fit(image, (resolution, resolution), Image.Resampling.LANCZOS), (width, height)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB in sRGB, with transparency on white."""
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        return _to_eight_bits(image).convert("RGB")
    profile = image.info.get("icc_profile")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image)
        image = white.convert("RGB")
    elif image.mode == "P":
        image = image.convert("RGB")
    return _to_srgb(image, profile).convert("RGB")


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert colors from the image's own profile (a phone's Display P3, a printer's CMYK) to sRGB."""
    if not profile or image.mode not in ("RGB", "CMYK", "L"):
        return image
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):  # damaged, or of another mode than the image
        return image
    return converted or image


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Scale gray of 16 or 32 bits, or of floating point, to 8 bits: by its format's range, else by its maximum."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0.0, neginf=0.0)
    top = float(values.max())
    if image.mode == "F":
        full = 1.0 if top <= 1 else 255.0 if top <= 255 else top
    else:
        full = 65535.0 if top <= 65535 else top
    return Image.fromarray((values.clip(0) / full * 255).round().astype(np.uint8))


def _to_gray(mask: Image.Image) -> Image.Image:
    """Convert a mask to 8-bit gray: its transparency if it has any, else its brightness."""
    if mask.has_transparency_data:
        alpha = mask.convert("RGBA").getchannel("A")
        if alpha.getextrema()[0] != 255:
            return alpha
    return _to_rgb(mask).convert("L")
