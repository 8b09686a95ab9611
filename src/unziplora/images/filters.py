"""Plain filters. What an image keeps under all of them is its content."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce, wraps

from PIL import Image, ImageChops, ImageFilter, ImageOps

Filter = Callable[[Image.Image], Image.Image]

FILTER_SIDE = 256
"""Side at which rank filters work. Larger images are reduced and enlarged again; a median at 1024 takes 30 seconds."""


def _side(image: Image.Image) -> float:
    """Return the side of a square of an image's area."""
    return math.sqrt(image.width * image.height)


def _resized(image: Image.Image, side: int, resampling: Image.Resampling) -> Image.Image:
    """Scale an image to about the area of a square with this side."""
    scale = side / _side(image)
    return image.resize((max(1, round(scale * image.width)), max(1, round(scale * image.height))), resampling)


def _gray(image: Image.Image) -> Image.Image:
    return image.convert("L").convert("RGB")


def _rotate_hue(degrees: int) -> Filter:
    def rotate(image: Image.Image) -> Image.Image:
        hue, saturation, value = image.convert("HSV").split()
        rotated = hue.point(lambda level: (level + degrees * 256 // 360) % 256)
        return Image.merge("HSV", (rotated, saturation, value)).convert("RGB")

    return rotate


def _blur(image: Image.Image, share: float = 0.02) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(share * _side(image)))


def _reduced(apply: Filter) -> Filter:
    @wraps(apply)
    def reduced(image: Image.Image) -> Image.Image:
        if _side(image) <= FILTER_SIDE:
            return apply(image)
        small = _resized(image, FILTER_SIDE, Image.Resampling.LANCZOS)
        return apply(small).resize(image.size, Image.Resampling.BICUBIC)

    return reduced


def _odd(length: float) -> int:
    """Round the size of a rank filter to an odd number of at least 3."""
    return max(3, round(length) // 2 * 2 + 1)


@_reduced
def _smooth(image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.MedianFilter(_odd(0.05 * _side(image))))


def _posterize(image: Image.Image) -> Image.Image:
    return ImageOps.posterize(_blur(image, 0.008), 2)


@_reduced
def _edges(image: Image.Image) -> Image.Image:
    """Show where a color channel changes from pixel to pixel, light on black (morphological gradient)."""
    soft, size = _blur(image, 0.012), _odd(0.02 * _side(image))
    change = ImageChops.difference(soft.filter(ImageFilter.MaxFilter(size)), soft.filter(ImageFilter.MinFilter(size)))
    return ImageOps.autocontrast(reduce(ImageChops.lighter, change.split()), cutoff=(5, 2)).convert("RGB")


def _coarse(image: Image.Image) -> Image.Image:
    return _resized(image, 24, Image.Resampling.BOX).resize(image.size, Image.Resampling.NEAREST)


FILTERS: dict[str, Filter] = {
    "gray": _gray,
    "inverted": ImageOps.invert,
    "blurred": _blur,
    "smoothed": _smooth,
    "hue 120": _rotate_hue(120),
    "hue 240": _rotate_hue(240),
    "posterized": _posterize,
    "edges": _edges,
    "edges inverted": lambda image: ImageOps.invert(_edges(image)),
    "coarse": _coarse,
}


def filtered(image: Image.Image) -> list[Image.Image]:
    """Return an RGB image and its versions under each of `FILTERS`, of the same size."""
    return [image, *(apply(image) for apply in FILTERS.values())]
