"""Dry media and line: pencil, crayon, chalk, blueprint, linocut."""

import cv2
import numpy as np

from recipes.base.filters.common import (
    Field,
    Pixels,
    blur,
    coordinates,
    finish,
    grey,
    hatch,
    noise,
    opacity,
    outline,
    over,
    saturate,
    warp,
)


def pencil(rgba: Pixels, rng: np.random.Generator) -> Pixels:
    """Graphite contours and three layers of hatching on drawing paper."""
    size = rgba.shape[0]
    k = size / 128
    rgba = warp(rgba, 0.8 * k, 6 * k, rng)
    shade = 1 - grey(over(rgba)) / 255
    hatching = np.zeros_like(shade)
    for degrees, threshold in ((45, 0.12), (-40, 0.4), (80, 0.65)):
        strokes = hatch(size, degrees, 4.2 * k, rng) * 0.5 + 0.5
        hatching += np.clip((shade - threshold) * 2.2, 0, 0.55) * strokes
    contour = np.clip((outline(rgba, 0.9 * k) - 0.2) * 1.1, 0, 0.85)
    graphite = (contour + 0.72 * hatching) * (0.9 + 0.2 * noise(size, 0.7 * k, rng))
    paper = np.clip(1 - graphite, 0.12, 1) * (0.975 + 0.012 * noise(size, 0.8 * k, rng))
    return finish(paper[..., None] * np.float32([250, 248, 244]))


def crayon(rgba: Pixels, rng: np.random.Generator) -> Pixels:
    """Waxy diagonal strokes that leave the grain of cream paper bare, with a soft dark contour."""
    size = rgba.shape[0]
    k = size / 128
    rgba = warp(rgba, 1.6 * k, 6 * k, rng)
    paper = np.float32([252, 244, 224])
    strokes = 0.6 * hatch(size, 35, 6.5 * k, rng) + 0.9 * noise(size, 0.9 * k, rng)
    cover = opacity(rgba) * np.clip(0.85 + 0.5 * strokes, 0.1, 1)
    wax = saturate(over(rgba), 0.35) * 0.97
    image = paper * (1 - cover[..., None]) + wax * cover[..., None]
    edge = np.clip((blur(outline(rgba, 1.2 * k), 0.9 * k) - 0.15) * 1.6, 0, 0.85)
    edge *= np.clip(0.8 + 0.45 * noise(size, 0.8 * k, rng), 0, 1)
    pigment = saturate(cv2.erode(over(rgba), np.ones((3, 3))), 0.6) * 0.5
    return finish(image * (1 - edge[..., None]) + pigment * edge[..., None])


def _board_lines(rgba: Pixels, rng: np.random.Generator) -> Field:
    """Broken, powdery contour of a stick of chalk, 0..1."""
    size = rgba.shape[0]
    k = size / 128
    edge = np.clip((blur(outline(rgba, 1.0 * k), 0.8 * k) - 0.16) * 2.6, 0, 1)
    return edge * np.clip(0.8 + 0.5 * noise(size, 0.8 * k, rng), 0, 1)


def chalk(rgba: Pixels, rng: np.random.Generator) -> Pixels:
    """Pastel chalk on a green-black board: powdery contours, loosely rubbed fills."""
    size = rgba.shape[0]
    k = size / 128
    rgba = warp(rgba, 1.2 * k, 6 * k, rng)
    smears = 1 + 0.25 * noise(size, 9 * k, rng) + 0.06 * noise(size, 1.0 * k, rng)
    board = np.float32([38, 56, 48]) * smears[..., None]
    fill = opacity(rgba) * np.clip(0.38 + 0.3 * hatch(size, 50, 5 * k, rng), 0, 1)
    fill *= np.clip(0.8 + 0.6 * noise(size, 0.8 * k, rng), 0, 1)
    pastel = 0.55 * saturate(over(rgba), 0.3) + 0.45 * 255
    image = board * (1 - fill[..., None]) + pastel * fill[..., None]
    lines = _board_lines(rgba, rng)[..., None]
    return finish(image * (1 - lines) + np.float32([244, 242, 232]) * lines)


def blueprint(rgba: Pixels, rng: np.random.Generator) -> Pixels:
    """White construction lines on deep blue paper with a fine grid."""
    size = rgba.shape[0]
    k = size / 128
    y, x = coordinates(size)
    shift = rng.integers(0, 16, 2) * k
    grid = ((x + shift[0]) % (16 * k) < k) | ((y + shift[1]) % (16 * k) < k)
    blue = np.float32([22, 66, 150]) * (1 + 0.05 * noise(size, 10 * k, rng))[..., None]
    image = blue + 26 * grid.astype(np.float32)[..., None]
    shade = np.clip(1 - grey(over(rgba)) / 255, 0, 1) * opacity(rgba)
    hatching = (hatch(size, 45, 5 * k, rng) > 0.45) * np.clip(shade - 0.25, 0, 0.5) * 0.8
    contour = np.clip((outline(rgba, 0.8 * k) - 0.18) * 2.6, 0, 1)
    lines = np.maximum(contour, hatching.astype(np.float32))[..., None]
    return finish(image * (1 - lines) + np.float32([236, 244, 255]) * lines)


LINOCUT_INKS = ((24, 22, 26), (150, 28, 30), (20, 52, 96), (20, 80, 56))


def linocut(rgba: Pixels, rng: np.random.Generator) -> Pixels:
    """One ink on cream paper, with gouge marks that follow the contour and stray chips around it."""
    size = rgba.shape[0]
    k = size / 128
    rgba = warp(rgba, 1.0 * k, 5 * k, rng)
    inside = opacity(rgba) > 0.5
    depth = cv2.distanceTransform(inside.astype(np.uint8), cv2.DIST_L2, 3)
    gouges = np.sin(2 * np.pi * (depth + 1.2 * noise(size, 4 * k, rng)) / (4.6 * k))
    light = blur(grey(over(rgba)), 0.8 * k) / 255
    ink = ((light + 0.27 * gouges < 0.62) & inside) | ((depth > 0) & (depth < 1.8 * k))
    ink &= ~((outline(rgba, 0.9 * k) > 0.55) & (depth > 3 * k))
    chips = (hatch(size, 73, 9 * k, rng) > 0.95) & (noise(size, 2 * k, rng) > 0.75) & (opacity(rgba) < 0.1)
    print_ = np.maximum(blur(ink.astype(np.float32), 0.6 * k), 0.5 * chips)
    print_ = np.clip(print_ * (0.93 + 0.12 * noise(size, 0.7 * k, rng)), 0, 1)[..., None]
    color = np.float32(LINOCUT_INKS[int(rng.integers(len(LINOCUT_INKS)))])
    return finish(np.float32([244, 236, 218]) * (1 - print_) + color * print_)


__all__ = ["blueprint", "chalk", "crayon", "linocut", "pencil"]
