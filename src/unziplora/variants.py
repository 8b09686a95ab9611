"""The same picture under plain filters: what stays alike in all of them is the content."""

from __future__ import annotations

from collections.abc import Callable

from PIL import Image, ImageFilter, ImageOps

Filter = Callable[[Image.Image], Image.Image]


def _grey(picture: Image.Image) -> Image.Image:
    return picture.convert("L").convert("RGB")


def _turned(degrees: int) -> Filter:
    def turn(picture: Image.Image) -> Image.Image:
        hue, saturation, value = picture.convert("HSV").split()
        turned = hue.point(lambda level: (level + degrees * 256 // 360) % 256)
        return Image.merge("HSV", (turned, saturation, value)).convert("RGB")

    return turn


def _blurred(picture: Image.Image, share: float = 0.02) -> Image.Image:
    return picture.filter(ImageFilter.GaussianBlur(share * picture.width))


def _smoothed(picture: Image.Image) -> Image.Image:
    return picture.filter(ImageFilter.MedianFilter(max(3, round(0.05 * picture.width) // 2 * 2 + 1)))


def _posterised(picture: Image.Image) -> Image.Image:
    return ImageOps.posterize(_blurred(picture, 0.008), 2)


def _edges(picture: Image.Image) -> Image.Image:
    found = _blurred(picture.convert("L"), 0.012).filter(ImageFilter.FIND_EDGES)
    return ImageOps.autocontrast(found).convert("RGB")


def _coarse(picture: Image.Image) -> Image.Image:
    return picture.resize((24, 24), Image.Resampling.BOX).resize(picture.size, Image.Resampling.NEAREST)


FILTERS: dict[str, Filter] = {
    "grey": _grey,
    "inverted": ImageOps.invert,
    "blurred": _blurred,
    "smoothed": _smoothed,
    "hue 120": _turned(120),
    "hue 240": _turned(240),
    "posterised": _posterised,
    "edges": _edges,
    "edges inverted": lambda picture: ImageOps.invert(_edges(picture)),
    "coarse": _coarse,
}


def filtered(picture: Image.Image) -> list[Image.Image]:
    """A square RGB picture itself, then under each of `FILTERS`, of the same size."""
    return [picture, *(change(picture) for change in FILTERS.values())]
