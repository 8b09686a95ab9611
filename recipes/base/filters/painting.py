"""Wet media, print dots and light: watercolor, oil, pointillism, halftone, neon."""

import cv2
import numpy as np

from recipes.base.filters.common import (
    Field,
    Pixels,
    blur,
    coordinates,
    finish,
    grey,
    noise,
    opacity,
    outline,
    over,
    saturate,
    slope,
    warp,
)


def watercolor(rgba: Pixels, rng: np.random.Generator) -> Pixels:
    """Transparent pigment that pools at wet edges and spills a pale wash around the drawing."""
    size = rgba.shape[0]
    k = size / 128
    rgba = warp(rgba, 2.2 * k, 7 * k, rng)
    color = blur(cv2.bilateralFilter(finish(over(rgba)), 9, 60, 5 * k).astype(np.float32), 1.3 * k)
    pigment = (255 - color) * 0.8
    pool = 1 + 0.2 * noise(size, 9 * k, rng) + 0.12 * noise(size, 3 * k, rng)
    pool += 0.35 * np.clip(blur(outline(rgba, 1.5 * k), 0.8 * k), 0, 1)
    pigment *= pool[..., None]
    reach = blur(opacity(rgba), 7 * k) + 0.35 * noise(size, 6 * k, rng)
    spill = np.clip((reach - 0.22) * 5, 0, 1) * 0.34
    wash = (255 - blur(over(rgba), 12 * k)) * spill[..., None]
    wet = blur(np.maximum(pigment, wash), 0.5 * k)
    paper = (0.975 + 0.018 * noise(size, 0.9 * k, rng))[..., None]
    return finish((255 - wet) * paper * np.float32([1, 0.995, 0.98]))


def _kuwahara(rgb: Field, radius: int) -> Field:
    """Replace each pixel by the mean of the calmest of eight windows next to it, as brush dabs do."""
    window = (radius + 1, radius + 1)
    mean = cv2.blur(rgb, window, borderType=cv2.BORDER_REFLECT)
    spread = cv2.blur(rgb * rgb, window, borderType=cv2.BORDER_REFLECT).sum(2) - (mean * mean).sum(2)
    h = (radius + 1) // 2
    best, calmest = mean, np.full(spread.shape, np.inf, np.float32)
    for step in ((-h, -h), (-h, h), (h, -h), (h, h), (0, -h), (0, h), (-h, 0), (h, 0)):
        shifted, variance = np.roll(mean, step, (0, 1)), np.roll(spread, step, (0, 1))
        calmer = variance < calmest
        best = np.where(calmer[..., None], shifted, best)
        calmest = np.where(calmer, variance, calmest)
    return best


def oil(rgba: Pixels, rng: np.random.Generator) -> Pixels:
    """Thick dabs whose bristle relief follows the contours, on an ochre ground."""
    size = rgba.shape[0]
    k = size / 128
    ground = over(rgba, (226, 206, 168)) + 9 * noise(size, 2.5 * k, rng)[..., None]
    ground += 16 * noise(size, 8 * k, rng)[..., None] * np.float32([1, 0.8, 0.5])
    dabs = _kuwahara(ground, max(2, round(3 * k)))
    gx, gy = (blur(g, 4 * k) + 1e-3 for g in slope(grey(dabs)))
    length = np.hypot(gx, gy)
    y, x = coordinates(size)
    grain = noise(size, 0.6 * k, rng)
    bristles = np.zeros_like(grain)
    for t in range(-5, 6):
        dx, dy = -gy / length * t * k, gx / length * t * k
        bristles += cv2.remap(grain, x + dx, y + dy, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
    relief = 5.5 * bristles + 3 * cv2.Sobel(bristles, cv2.CV_32F, 1, 1, ksize=3)
    return finish(saturate(dabs, 0.3) + relief[..., None])


def _disc(canvas: Pixels, center: tuple[float, float], radius: float, color: Field) -> None:
    """Paint an anti-aliased disc; center is (y, x)."""
    point = (int(center[1] * 4), int(center[0] * 4))
    cv2.circle(canvas, point, int(radius * 4), [int(v) for v in color], -1, cv2.LINE_AA, 2)


def pointillism(rgba: Pixels, rng: np.random.Generator) -> Pixels:
    """Dots of broken color over the whole canvas."""
    size, scale = rgba.shape[0], 2
    k = size / 128
    source = over(rgba, (250, 244, 228))
    canvas = np.full((size * scale, size * scale, 3), (246, 240, 226), np.uint8)
    step = 3.4 * k
    grid = np.mgrid[0:size:step, 0:size:step].reshape(2, -1).T
    dots = np.concatenate([grid, grid + step / 2])
    dots = dots + rng.uniform(-0.45, 0.45, dots.shape) * step
    rng.shuffle(dots)
    at = np.clip(dots.round().astype(int), 0, size - 1)
    colors = source[at[:, 0], at[:, 1]] + rng.normal(0, 1, (len(at), 3)) * np.float32([26, 22, 30])
    colors = np.clip(saturate(colors.astype(np.float32), 0.35), 0, 255)
    for center, color, radius in zip(dots * scale, colors, rng.uniform(1.6, 2.4, len(at)), strict=True):
        _disc(canvas, center, radius * k * scale, color)
    return cv2.resize(canvas, (size, size), interpolation=cv2.INTER_AREA)


def halftone(rgba: Pixels, rng: np.random.Generator) -> Pixels:
    """Pop-art print: flat strong colors, a screen of dots, bold black contours, a sunny ground."""
    size = rgba.shape[0]
    k = size / 128
    y, x = coordinates(size)
    phase = rng.uniform(0, 6, 2)
    period = 2 * np.pi / (5.7 * k)
    screen = np.sin((x + y) * period * 0.7071 + phase[0]) * np.sin((x - y) * period * 0.7071 + phase[1])
    color = saturate(over(rgba), 0.5)
    flat = np.round(np.clip(color, 0, 255) / 64) * 64
    shade = 1 - grey(over(rgba)) / 255
    dark = np.clip((0.9 * shade - 0.5 - 0.5 * screen) * 4, 0, 1) * opacity(rgba)
    inked = flat * (1 - 0.45 * dark[..., None])
    dots = np.clip((screen - 0.35) * 4, 0, 1)[..., None]
    ground = np.float32([255, 214, 40]) * (1 - dots) + np.float32([246, 120, 60]) * dots
    cover = opacity(rgba)[..., None]
    image = ground * (1 - cover) + inked * cover
    line = np.clip((blur(outline(rgba, 1.0 * k), 0.7 * k) - 0.2) * 3.2, 0, 1)[..., None]
    return finish(image * (1 - line) + np.float32([14, 12, 16]) * line)


def neon(rgba: Pixels, rng: np.random.Generator) -> Pixels:
    """Glowing tubes along the contours, in the drawing's own hues, on a night ground."""
    size = rgba.shape[0]
    k = size / 128
    tubes = blur(np.clip((outline(rgba, 1.0 * k) - 0.18) * 1.7, 0, 1), 0.5 * k)
    hsv = cv2.cvtColor(finish(blur(over(rgba), 2 * k)), cv2.COLOR_RGB2HSV)
    grey_hue = 150 if rng.random() < 0.5 else 95
    hsv[..., 0] = np.where(hsv[..., 1] < 40, grey_hue, hsv[..., 0])
    hsv[..., 1], hsv[..., 2] = 235, 255
    light = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB).astype(np.float32) * tubes[..., None]
    glow = 1.1 * blur(light, 2.2 * k) + 1.2 * blur(light, 6 * k)
    core = 280 * np.clip(tubes - 0.45, 0, 1)[..., None]
    return finish(np.float32([8, 7, 18]) + glow + 0.9 * light + core)
