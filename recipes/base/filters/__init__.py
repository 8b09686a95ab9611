"""Procedural style filters: ``f(rgba, rng) -> rgb`` on uint8 images of any square size.

Lengths inside the filters are written for 128 pixels and scale with the image.
"""

from collections.abc import Callable

import cv2
import numpy as np

from recipes.base.filters import craft, drawing, painting
from recipes.base.filters.common import Pixels, finish, over

Filter = Callable[[Pixels, np.random.Generator], Pixels]

FILTERS: dict[str, Filter] = {
    "pencil": drawing.pencil,
    "crayon": drawing.crayon,
    "chalk": drawing.chalk,
    "blueprint": drawing.blueprint,
    "linocut": drawing.linocut,
    "watercolor": painting.watercolor,
    "oil": painting.oil,
    "pointillism": painting.pointillism,
    "halftone": painting.halftone,
    "neon": painting.neon,
    "pixelart": craft.pixelart,
    "mosaic": craft.mosaic,
    "crossstitch": craft.crossstitch,
    "stained": craft.stained,
    "clay": craft.clay,
}


def rendered(rgba: Pixels, name: str | None, rng: np.random.Generator, size: int) -> Pixels:
    """Render a drawing [S, S, 4], under a filter or as it is, then area-averaged: uint8 [size, size, 3]."""
    rgb = finish(over(rgba)) if name is None else FILTERS[name](rgba, rng)
    return rgb if size == rgb.shape[0] else cv2.resize(rgb, (size, size), interpolation=cv2.INTER_AREA)
