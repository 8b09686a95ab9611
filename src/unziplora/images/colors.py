"""Colors of any mode and profile, as sRGB in 8 bits."""

from __future__ import annotations

from io import BytesIO

import numpy as np
from PIL import Image, ImageCms


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB in sRGB, with transparency on white."""
    profile = image.info.get("icc_profile")
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        return _to_srgb(_to_eight_bits(image), profile)
    if not image.has_transparency_data:
        return _to_srgb(image.convert("RGB") if image.mode in ("P", "1") else image, profile)
    gray = image.mode in ("L", "LA", "La")
    image = image.convert("LA" if image.mode == "La" else "RGBA")
    colors = _to_srgb(image.convert("L" if gray else "RGB"), profile)
    white = Image.new("RGBA", image.size, "white")
    colors.putalpha(image.getchannel("A"))
    white.alpha_composite(colors)
    return white.convert("RGB")


def to_gray(mask: Image.Image) -> Image.Image:
    """Convert a mask to 8-bit gray: its transparency if it has any, else its brightness."""
    if mask.has_transparency_data:
        alpha = mask.convert("RGBA").getchannel("A")
        if alpha.getextrema()[0] != 255:
            return alpha
    return to_rgb(mask).convert("L")


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert colors from the image's own profile (a phone's Display P3, a printer's CMYK, a scan's gray) to sRGB.

    LAB needs no profile. A profile that is damaged or of another mode is ignored.
    """
    try:
        if image.mode == "LAB":
            source = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
        elif profile:
            source = ImageCms.ImageCmsProfile(BytesIO(profile))
        else:
            return image.convert("RGB")
        if image.mode == "L" and source.profile.xcolor_space.strip() == "RGB":
            image = image.convert("RGB")
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image.convert("RGB")
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
