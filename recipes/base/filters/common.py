"""Common parts of the filters: compositing, texture noise, outlines, warps."""

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
Field = NDArray[np.float32]

cv2.setNumThreads(1)


def over(rgba: Pixels, paper: Sequence[float] = (255, 255, 255)) -> Field:
    """Put a drawing on a paper color, float [S, S, 3] in 0..255."""
    cover = opacity(rgba)[..., None]
    return rgba[..., :3].astype(np.float32) * cover + np.float32(paper) * (1 - cover)


def opacity(rgba: Pixels) -> Field:
    """Return alpha as [S, S] in 0..1."""
    return rgba[..., 3].astype(np.float32) / 255


def grey(rgb: Field) -> Field:
    """Compute the luma of [..., 3] as [...]."""
    return rgb @ np.float32([0.299, 0.587, 0.114])


def saturate(rgb: Field, amount: float) -> Field:
    """Push colors away from gray: 0 leaves them, 1 doubles the chroma."""
    return rgb + (rgb - grey(rgb)[..., None]) * np.float32(amount)


def blur(field: Field, sigma: float) -> Field:
    """Apply a Gaussian blur."""
    return cv2.GaussianBlur(field, (0, 0), sigma)


def finish(rgb: Field) -> Pixels:
    """Clip and round to uint8."""
    return np.clip(rgb + 0.5, 0, 255).astype(np.uint8)


def noise(size: int, sigma: float, rng: np.random.Generator) -> Field:
    """Draw smooth noise [size, size], mostly within -1..1; sigma is its grain in pixels."""
    raw = rng.standard_normal((size, size)).astype(np.float32)
    soft = blur(raw, sigma) if sigma > 0 else raw
    return soft / (1.8 * float(np.abs(soft).std()) + 1e-6)


def coordinates(size: int) -> tuple[Field, Field]:
    """Return pixel coordinates (y, x), each [size, size]."""
    y, x = np.mgrid[:size, :size].astype(np.float32)
    return y, x


def warp(rgba: Pixels, amplitude: float, sigma: float, rng: np.random.Generator) -> Pixels:
    """Displace the image by smooth noise, as by an unsteady hand."""
    size = rgba.shape[0]
    y, x = coordinates(size)
    dx, dy = (amplitude * noise(size, sigma, rng) for _ in range(2))
    return cv2.remap(rgba, x + dx, y + dy, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def slope(field: Field) -> tuple[Field, Field]:
    """Compute Sobel derivatives along x and y."""
    return cv2.Sobel(field, cv2.CV_32F, 1, 0, ksize=3), cv2.Sobel(field, cv2.CV_32F, 0, 1, ksize=3)


def outline(rgba: Pixels, sigma: float) -> Field:
    """Compute the strength of contours, 0..1, from steps in lightness, color and alpha."""
    lab = cv2.cvtColor(finish(over(rgba)), cv2.COLOR_RGB2LAB).astype(np.float32)
    channels = (lab[..., 0], lab[..., 1] * 1.4, lab[..., 2] * 1.4, rgba[..., 3].astype(np.float32))
    steps = [np.hypot(*slope(blur(channel, sigma))) for channel in channels]
    return np.clip(np.max(steps, axis=0) / 180, 0, 1)


def hatch(size: int, degrees: float, period: float, rng: np.random.Generator) -> Field:
    """Draw wavy parallel strokes as a sine in -1..1."""
    y, x = coordinates(size)
    angle = np.deg2rad(degrees)
    along = x * np.cos(angle) + y * np.sin(angle) + 1.1 * noise(size, 5 * size / 128, rng)
    return np.sin(2 * np.pi * along / period)


def palette(rgb: Field, colors: int, rng: np.random.Generator) -> NDArray[np.int32]:
    """Return the label [S, S] of each pixel after k-means on the colors."""
    pixels = np.ascontiguousarray(rgb.reshape(-1, 3), np.float32)
    cv2.setRNGSeed(int(rng.integers(1 << 30)))
    stop = (cv2.TERM_CRITERIA_MAX_ITER + cv2.TERM_CRITERIA_EPS, 8, 1.0)
    _, _, centers = cv2.kmeans(pixels[::4].copy(), colors, None, stop, 1, cv2.KMEANS_PP_CENTERS)
    distance = ((pixels[:, None] - centers[None]) ** 2).sum(2)
    return distance.argmin(1).reshape(rgb.shape[:2]).astype(np.int32)


def cell_means(rgb: Field, cells: NDArray[np.int64]) -> Field:
    """Replace each cell of a labeled image by its mean color."""
    flat = cells.ravel()
    count = np.maximum(np.bincount(flat), 1)
    means = np.stack([np.bincount(flat, rgb[..., i].ravel()) / count for i in range(3)], 1)
    return means[cells].astype(np.float32)
