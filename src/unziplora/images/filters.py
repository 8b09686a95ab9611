"""The same picture under plain filters: what stays alike in all of them is the content."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce, wraps

from PIL import Image, ImageChops, ImageFilter, ImageOps

Filter = Callable[[Image.Image], Image.Image]

FILTER_WIDTH = 256
"""Wider pictures are made this wide before a rank filter and enlarged again: a median at 1024 takes half a minute."""


def _gray(picture: Image.Image) -> Image.Image:
    return picture.convert("L").convert("RGB")


def _turned(degrees: int) -> Filter:
    def turn(picture: Image.Image) -> Image.Image:
        hue, saturation, value = picture.convert("HSV").split()
        turned = hue.point(lambda level: (level + degrees * 256 // 360) % 256)
        return Image.merge("HSV", (turned, saturation, value)).convert("RGB")

    return turn


def _blurred(picture: Image.Image, share: float = 0.02) -> Image.Image:
    return picture.filter(ImageFilter.GaussianBlur(share * picture.width))


def _at_filter_width(change: Filter) -> Filter:
    @wraps(change)
    def changed(picture: Image.Image) -> Image.Image:
        if picture.width <= FILTER_WIDTH:
            return change(picture)
        small = picture.resize((FILTER_WIDTH, FILTER_WIDTH), Image.Resampling.LANCZOS)
        return change(small).resize(picture.size, Image.Resampling.BICUBIC)

    return changed


def _odd(length: float) -> int:
    """The size of a rank filter: odd, at least 3."""
    return max(3, round(length) // 2 * 2 + 1)


@_at_filter_width
def _smoothed(picture: Image.Image) -> Image.Image:
    return picture.filter(ImageFilter.MedianFilter(_odd(0.05 * picture.width)))


def _posterized(picture: Image.Image) -> Image.Image:
    return ImageOps.posterize(_blurred(picture, 0.008), 2)


@_at_filter_width
def _edges(picture: Image.Image) -> Image.Image:
    """Light where a color channel changes from pixel to pixel, black elsewhere (morphological gradient)."""
    soft, size = _blurred(picture, 0.012), _odd(0.02 * picture.width)
    change = ImageChops.difference(soft.filter(ImageFilter.MaxFilter(size)), soft.filter(ImageFilter.MinFilter(size)))
    return ImageOps.autocontrast(reduce(ImageChops.lighter, change.split()), cutoff=(5, 2)).convert("RGB")


def _coarse(picture: Image.Image) -> Image.Image:
    return picture.resize((24, 24), Image.Resampling.BOX).resize(picture.size, Image.Resampling.NEAREST)


FILTERS: dict[str, Filter] = {
    "gray": _gray,
    "inverted": ImageOps.invert,
    "blurred": _blurred,
    "smoothed": _smoothed,
    "hue 120": _turned(120),
    "hue 240": _turned(240),
    "posterized": _posterized,
    "edges": _edges,
    "edges inverted": lambda picture: ImageOps.invert(_edges(picture)),
    "coarse": _coarse,
}


def filtered(picture: Image.Image) -> list[Image.Image]:
    """A square RGB picture itself, then under each of `FILTERS`, of the same size."""
    return [picture, *(change(picture) for change in FILTERS.values())]
