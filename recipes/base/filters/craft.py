"""Grids, glass and modelling: pixelart, mosaic, crossstitch, stained, clay."""

import cv2
import numpy as np
from numpy.typing import NDArray

from recipes.base.filters.common import (
    Field,
    Pixels,
    blur,
    cell_means,
    coordinates,
    finish,
    noise,
    opacity,
    outline,
    over,
    palette,
    saturate,
)


def _coarse(rgba: Pixels, cells: int) -> tuple[Field, Field]:
    """Colors [n, n, 3] and opacity [n, n] of an area-averaged n × n version."""
    alpha = opacity(rgba)
    premultiplied = np.dstack([rgba[..., :3] * alpha[..., None], alpha]).astype(np.float32)
    small = cv2.resize(premultiplied, (cells, cells), interpolation=cv2.INTER_AREA)
    return small[..., :3] / np.maximum(small[..., 3:], 1e-3), small[..., 3]


def pixelart(rgba: Pixels, rng: np.random.Generator, cells: int = 32) -> Pixels:
    """A 32 × 32 sprite of few colors with a dark rim, on pale lilac."""
    size = rgba.shape[0]
    color, alpha = _coarse(rgba, cells)
    inside = alpha > 0.5
    cross = np.uint8([[0, 1, 0], [1, 1, 1], [0, 1, 0]])
    core = cv2.erode(inside.astype(np.uint8), cross, borderValue=0) > 0
    sprite = np.clip(np.round(saturate(color, 0.25) / 51) * 51, 0, 255)
    rim = inside & ~core
    sprite[rim] = sprite[rim] * 0.3 + np.float32([16, 8, 40])
    tint = np.float32([214, 206, 240]) + rng.uniform(-6, 6, 3).astype(np.float32)
    sprite[~inside] = tint
    return cv2.resize(finish(sprite), (size, size), interpolation=cv2.INTER_NEAREST)


def mosaic(rgba: Pixels, rng: np.random.Generator) -> Pixels:
    """Bevelled tiles in courses with gray grout."""
    size = rgba.shape[0]
    tile = max(4, round(7 * size / 128))
    y, x = (c.astype(np.int64) for c in coordinates(size))
    x = x + (y // tile % 2) * (tile // 2)
    cells = np.unique(y // tile * 512 + x // tile, return_inverse=True)[1].reshape(size, size)
    tone = rng.normal(0, 13, (cells.max() + 1, 1)).astype(np.float32)
    color = saturate(cell_means(over(rgba, (222, 208, 180)), cells), 0.5) + tone[cells]
    row, column = y % tile, x % tile
    bevel = 20 * ((row == 1) | (column == 1)) - 24 * ((row == tile - 1) | (column == tile - 1))
    grout = ((row == 0) | (column == 0))[..., None]
    return finish(np.where(grout, np.float32([104, 98, 92]), color + bevel[..., None]))


def _stitch(unit: int) -> tuple[Field, Field, Field, Field]:
    """Masks and shading of the two crossing threads of one stitch, each [unit, unit]."""
    y, x = np.mgrid[:unit, :unit] + 0.5
    width = 0.3 * unit
    rising, falling = np.abs(x - y), np.abs(x + y - unit)
    masks = [np.clip(width - d, 0, 1) for d in (rising, falling)]
    shades = [a + b * np.clip(1 - d / width, 0, 1) for a, b, d in ((0.62, 0.38, rising), (0.74, 0.36, falling))]
    return masks[0], masks[1], shades[0], shades[1]


def crossstitch(rgba: Pixels, rng: np.random.Generator, cells: int = 24) -> Pixels:
    """Crossed threads on linen."""
    size, unit = rgba.shape[0], 8
    color, alpha = _coarse(rgba, cells)
    thread = saturate(np.round(color / 28) * 28 * 1.06, 0.35) + rng.normal(0, 5, color.shape)
    threads = np.kron(np.clip(thread, 0, 255), np.ones((unit, unit, 1)))
    sewn = np.kron(alpha > 0.43, np.ones((unit, unit)))[..., None]
    tiled = [np.tile(part, (cells, cells))[..., None] for part in _stitch(unit)]
    y, x = coordinates(cells * unit)
    weave = 0.93 + 0.07 * ((y % unit > 0) & (x % unit > 0))
    weave = np.where((y % unit < 2) & (x % unit < 2), weave * 0.8, weave)
    cloth = np.float32([236, 228, 210]) * weave[..., None]
    for mask, shade in ((tiled[0], tiled[2]), (tiled[1], tiled[3])):
        cloth = cloth * (1 - mask * sewn) + threads * shade * mask * sewn
    return cv2.resize(finish(cloth), (size, size), interpolation=cv2.INTER_AREA)


def _voronoi(size: int, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Label [size, size] of the nearest of `count` random seeds."""
    plane = np.full((size, size), 255, np.uint8)
    seeds = rng.integers(0, size, (count, 2))
    plane[seeds[:, 0], seeds[:, 1]] = 0
    _, labels = cv2.distanceTransformWithLabels(plane, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)
    return labels.astype(np.int64)


def stained(rgba: Pixels, rng: np.random.Generator) -> Pixels:
    """Panes of colored glass in lead, lit from the upper left."""
    size = rgba.shape[0]
    k = size / 128
    image = over(rgba, (178, 205, 226))
    calm = cv2.bilateralFilter(finish(image), 9, 50, 5).astype(np.float32)
    tones = cv2.medianBlur(palette(calm, 7, rng).astype(np.uint8), 5).astype(np.int64)
    panes = np.unique(_voronoi(size, 64, rng) * 16 + tones, return_inverse=True)[1].reshape(size, size)
    tone = rng.normal(0, 13, (panes.max() + 1, 1)).astype(np.float32)
    glass = saturate(cell_means(image, panes) + tone[panes], 0.45)
    border = (panes != np.roll(panes, 1, 0)) | (panes != np.roll(panes, 1, 1))
    lead = np.clip(blur(border.astype(np.float32), 0.75 * k) * 2.3, 0, 1)[..., None]
    y, x = coordinates(size)
    light = 1.12 - 0.3 * np.hypot(x / size - 0.4, y / size - 0.35)[..., None]
    return finish(glass * light * (1 - lead) + np.float32([26, 24, 28]) * lead)


def _relief(rgba: Pixels, rng: np.random.Generator) -> Field:
    """Height [S, S] of a pillowed, slightly uneven body with grooves along inner contours."""
    size = rgba.shape[0]
    k = size / 128
    inside = blur(opacity(rgba), 1.2 * k) > 0.5
    depth = np.minimum(cv2.distanceTransform(inside.astype(np.uint8), cv2.DIST_L2, 5) / (9 * k), 1)
    height = np.sqrt(np.clip(1 - (1 - depth) ** 2, 0, 1)) * 6 * k
    height -= blur(outline(rgba, 1.0 * k), 0.9 * k) * 2.6 * k * (depth > 0.2)
    return blur(height, 1.4 * k) + 0.25 * k * noise(size, 1.6 * k, rng)


def clay(rgba: Pixels, rng: np.random.Generator) -> Pixels:
    """Plasticine: rounded bodies, soft highlights, a cast shadow on a pale table."""
    size = rgba.shape[0]
    k = size / 128
    cover = blur(opacity(rgba), 1.2 * k)
    height = _relief(rgba, rng)
    gx, gy = (cv2.Sobel(height, cv2.CV_32F, *d, scale=0.125) for d in ((1, 0), (0, 1)))
    nz = 1 / np.sqrt(1 + 4 * gx * gx + 4 * gy * gy)
    nx, ny = -2 * gx * nz, -2 * gy * nz
    diffuse = np.clip(-0.45 * nx - 0.6 * ny + 0.66 * nz, 0, 1)[..., None]
    shine = np.clip(-0.3 * nx - 0.42 * ny + 0.86 * nz, 0, 1)[..., None] ** 22
    color = cv2.bilateralFilter(finish(over(rgba)), 7, 50, 4).astype(np.float32)
    body = (color * 0.92 + 12) * (0.5 + 0.72 * diffuse) + 70 * shine
    shadow = blur(np.roll(cover, (int(5 * k), int(3 * k)), (0, 1)), 4 * k)[..., None] * 0.38
    table = np.float32([236, 232, 226]) * (1 - shadow)
    front = np.clip((cover - 0.35) * 3.3, 0, 1)[..., None]
    return finish(body * front + table * (1 - front))
