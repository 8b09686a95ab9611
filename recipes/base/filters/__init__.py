"""Procedural style filters: ``f(rgba, rng) -> rgb`` on uint8 pictures of any square size.

Lengths inside the filters are written for 128 pixels and scale with the picture.
"""

from collections.abc import Callable

import numpy as np

from recipes.base.filters import craft, drawing, painting
from recipes.base.filters.common import Picture

Filter = Callable[[Picture, np.random.Generator], Picture]

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
