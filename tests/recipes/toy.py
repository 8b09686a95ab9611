"""Drawings of the toy world, and a stop condition."""

from __future__ import annotations

import cv2
import numpy as np


class After:
    """Stop condition that becomes true after some steps."""

    def __init__(self, steps: int):
        self.left = steps

    def __bool__(self) -> bool:
        self.left -= 1
        return self.left <= 0


def shape(concept: int, style: int) -> np.ndarray:
    """A drawing [128, 128, 4]: the corners of a polygon depend on the concept, its color on the set."""
    image = np.zeros((128, 128, 4), np.uint8)
    color = [int(c) for c in np.random.default_rng(style).integers(30, 220, 3)]
    angles = np.linspace(0, 2 * np.pi, concept + 3, endpoint=False)
    corners = np.stack([64 + 50 * np.cos(angles), 64 + 50 * np.sin(angles)], 1).astype(np.int32)
    cv2.fillPoly(image, [corners], (*color, 255))
    cv2.circle(image, (64, 64), 14, (250, 240, 60, 255), -1)
    return image
