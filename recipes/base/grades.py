"""Variants of styles: the same image on other paper, in other pigments, with another texture."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from recipes.base.processes import on_processes

PAPERS: dict[str, tuple[float, float, float]] = {
    "white": (1.0, 1.0, 1.0),
    "cream": (0.96, 0.92, 0.8),
    "yellow": (0.96, 0.9, 0.68),
    "orange": (0.97, 0.8, 0.68),
    "pink": (0.97, 0.75, 0.84),
    "purple": (0.85, 0.72, 0.95),
    "blue": (0.72, 0.83, 0.96),
    "green": (0.75, 0.95, 0.75),
    "grey": (0.75, 0.75, 0.75),
}


@dataclass
class Grade:
    """Paper, pigments and texture of an image."""

    matrix: np.ndarray
    """Matrix on RGB that rotates hues and scales chroma, [3, 3]."""
    gamma: float
    dark: np.ndarray
    light: np.ndarray
    """Colors that replace black and white, in 0…1."""
    texture: float
    """Strength of grain or hatching, 0 for none."""
    period: float
    """Pixels from ridge to ridge, at 64 pixels a side."""
    angle: float | None
    """Direction of hatching in radians; None for grain."""

    @classmethod
    def none(cls) -> Grade:
        """Return the grade that changes nothing."""
        return cls(np.eye(3), 1.0, np.zeros(3), np.ones(3), 0.0, 4.0, None)

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Grade:
        """Draw a grade that is visible at a glance."""
        light = 1 - rng.uniform(0, 0.35, 3) * rng.choice([0.3, 1.0])
        dark = rng.uniform(0, 0.35, 3) * rng.choice([0.2, 1.0])
        strength = rng.choice([0.0, rng.uniform(0.12, 0.4)])
        angle = rng.uniform(0, np.pi) if rng.random() < 0.5 else None
        turn = rng.choice([0.0, rng.uniform(-np.pi, np.pi)])
        matrix = hue_matrix(turn, rng.uniform(0.3, 1.5))
        return cls(matrix, float(np.exp(rng.uniform(-0.5, 0.5))), dark, light, strength, rng.uniform(2.5, 8), angle)

    def field(self, size: int, rng: np.random.Generator) -> np.ndarray:
        """Return the texture [size, size] at a random place, roughly within −1…1."""
        if self.angle is None:
            soft = cv2.GaussianBlur(rng.standard_normal((size, size)), (0, 0), self.period / 5)
            return soft / (1.5 * soft.std())
        y, x = np.mgrid[:size, :size]
        along = (x * np.cos(self.angle) + y * np.sin(self.angle)) / self.period * 64 / size
        return np.sin(2 * np.pi * (along + rng.random()))

    def apply(self, pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Grade one image, float [R, R, 3] in 0…1."""
        toned = np.clip(pixels @ self.matrix.T, 0, 1) ** self.gamma
        graded = self.dark + (self.light - self.dark) * toned
        if self.texture:
            graded = graded * (1 + self.texture * self.field(pixels.shape[0], rng)[..., None])
        return np.clip(graded, 0, 1)

    @property
    def words(self) -> str:
        """Name of the paper in prompts: "grainy blue paper"."""
        paper = min(PAPERS, key=lambda name: float(np.square(np.array(PAPERS[name]) - self.light).sum()))
        texture = ("grainy " if self.angle is None else "hatched ") if self.texture else ""
        return f"{texture}{paper} paper"


def hue_matrix(angle: float, chroma: float) -> np.ndarray:
    """Return the matrix [3, 3] that rotates colors about the gray axis, in radians, and scales their chroma."""
    grey = np.full((3, 3), 1 / 3)
    cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3)
    return grey + chroma * (np.cos(angle) * (np.eye(3) - grey) + np.sin(angle) * cross)


def grade_each(pixels: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, list[str]]:
    """Grade each image uint8 [N, R, R, 3] differently; return the images and the words for each."""
    grades = [Grade.draw(rng) for _ in pixels]
    images = [grade.apply(one / 255, rng) for grade, one in zip(grades, pixels, strict=True)]
    return np.round(255 * np.stack(images)).astype(np.uint8), [grade.words for grade in grades]


def _grade_chunk(job: tuple[np.ndarray, tuple[int, int]]) -> tuple[np.ndarray, list[str]]:
    pixels, seed = job
    return grade_each(pixels, np.random.default_rng(seed))


def grade_all(pixels: np.ndarray, seed: int, workers: int, first: int = 0) -> tuple[np.ndarray, list[str]]:
    """Grade images as `grade_each` does, on several processes; the number of processes does not change the result.

    Args:
        first: number of the first image. Parts that begin at multiples of 256 get the same grades as all images in
            one call.
    """
    jobs = [(pixels[i : i + 256], (seed, first + i)) for i in range(0, len(pixels), 256)]
    parts = on_processes(_grade_chunk, jobs, workers)
    return np.concatenate([graded for graded, _ in parts]), [name for _, names in parts for name in names]


def grade_some(pixels: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Grade a share of images uint8 [N, R, R, 3], each differently; leave the others as they are."""
    return np.stack([grade_each(one[None], rng)[0][0] if rng.random() < share else one for one in pixels])
