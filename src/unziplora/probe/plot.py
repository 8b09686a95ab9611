"""Plot and contact sheet of the probe."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from unziplora.config.recipe import KINDS
from unziplora.images.sheet import INK, PAPER, sheet
from unziplora.probe.scores import Findings, Score

COLORS = {"content": (0, 114, 178), "style": (230, 159, 0)}  # distinct for color-blind people too (Okabe and Ito)
FAINT = (224, 224, 224)
SMALL = 192  # pixels: side of an image in the sheet
BAR, ROW = 11, 36  # pixels: height of a bar, and of a block's row
LEFT, WIDE, RIGHT, TOP, BOTTOM = 260, 520, 90, 74, 40  # pixels around and in the field of the bars


def plot(findings: Findings) -> Image.Image:
    """Draw a row per block, with a bar for content and one for style, and whiskers for the standard error."""
    font, small = ImageFont.load_default(size=15), ImageFont.load_default(size=13)
    height = TOP + ROW * len(findings.blocks) + BOTTOM
    canvas = Image.new("RGB", (LEFT + WIDE + RIGHT, height), PAPER)
    draw = ImageDraw.Draw(canvas)
    scores = [getattr(row, axis) for row in findings.blocks.values() for axis in KINDS]
    tenths = max(1, min(10, -(-int(1000 * max(map(_upper_end, scores))) // 100)))
    draw.text((16, 12), f"{findings.base}: movement towards the other prompt, block by block", INK, font)
    for number, axis in enumerate(KINDS):
        x = LEFT + 110 * number
        draw.rectangle((x, 42, x + BAR, 42 + BAR), COLORS[axis])
        draw.text((x + BAR + 6, 42 + BAR / 2), axis, INK, small, anchor="lm")
    for tenth in range(tenths + 1):
        x = LEFT + round(WIDE * tenth / tenths)
        draw.line((x, TOP - 6, x, height - BOTTOM), FAINT)
        draw.text((x, height - BOTTOM + 6), f"{tenth / 10:g}", INK, small, anchor="ma")
    for number, (block, row) in enumerate(findings.blocks.items()):
        middle = TOP + ROW * number + ROW // 2
        owner = findings.owner(block)
        draw.text((LEFT - 12, middle), block, INK, font, anchor="rm")
        if owner:
            draw.text((LEFT + WIDE + 14, middle), owner, INK, small, anchor="lm")
        for axis, y in zip(KINDS, (middle - BAR - 1, middle + 1), strict=True):
            _draw_bar(draw, getattr(row, axis), y, WIDE * 10 / tenths, axis)
    return canvas


def _draw_bar(draw: ImageDraw.ImageDraw, score: Score, y: int, scale: float, axis: str) -> None:
    """Draw one bar below y; `scale` is pixels for a movement of 1."""
    end = LEFT + min(scale * score.mean, WIDE)
    draw.rectangle((LEFT, y, max(LEFT, round(end)), y + BAR - 1), COLORS[axis])
    if score.error:
        low, high = (LEFT + min(max(scale * (score.mean + sign * score.error), 0), WIDE) for sign in (-1, 1))
        middle = y + BAR // 2
        draw.line((low, middle, high, middle), INK)
        for x in (low, high):
            draw.line((x, middle - 3, x, middle + 3), INK)


def _upper_end(score: Score) -> float:
    return score.mean + (score.error or 0.0)


def image_sheet(columns: Sequence[Sequence[Image.Image]], rows: Sequence[str], heads: Sequence[str]) -> Image.Image:
    """Lay out the images of one pair: a row for P, for each block, for all blocks, and for Q.

    Args:
        columns: images from top to bottom, one column per swap and seed.
        rows, heads: labels on the left and on top.
    """
    small = [[image.resize((SMALL, SMALL), Image.Resampling.LANCZOS) for image in column] for column in columns]
    return sheet([list(row) for row in zip(*small, strict=True)], rows, heads)
