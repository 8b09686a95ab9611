"""Labeled grids of images."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont

from unziplora.errors import UserError

INK, PAPER = (32, 32, 32), (255, 255, 255)
GAP = 4
LARGEST = 16_000  # pixels per side; viewers and PNG libraries give up not far above


def sheet(
    images: Sequence[Sequence[Image.Image | None]], rows: Sequence[str] = (), columns: Sequence[str] = ()
) -> Image.Image:
    """Arrange images in a grid with row labels on the left and column labels on top.

    Args:
        images: rows of images, top to bottom. Rows may be short; None leaves a gap. Each cell is as large as the
            largest image; smaller ones are centered.
        rows: one label per row, or none at all.
        columns: one label per column, or none at all.

    Raises:
        UserError: there are no images, or the sheet would be too large for viewers.
    """
    present = [image for row in images for image in row if image is not None]
    if not present:
        raise UserError("a grid needs at least one image")
    width, height = max(image.width for image in present), max(image.height for image in present)
    font, heads, sides, left, top, size = plan_sheet((width, height), len(images), max(map(len, images)), rows, columns)
    canvas = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(canvas)
    for column, head in enumerate(heads):
        center = left + GAP + column * (width + GAP) + width / 2
        draw.multiline_text((center, top / 2), head, INK, font, anchor="mm", align="center")
    for row, line in enumerate(images):
        y = top + GAP + row * (height + GAP)
        if row < len(sides):
            draw.multiline_text((left / 2, y + height / 2), sides[row], INK, font, anchor="mm", align="center")
        for column, image in enumerate(line):
            if image is not None:
                x = left + GAP + column * (width + GAP) + (width - image.width) // 2
                canvas.paste(image.convert("RGB"), (x, y + (height - image.height) // 2))
    return canvas


class Plan(NamedTuple):
    """Font, wrapped labels, room for them on the left and on top, and size of a sheet."""

    font: Any
    heads: list[str]
    sides: list[str]
    left: int
    top: int
    size: tuple[int, int]


def plan_sheet(
    cell: tuple[int, int], lines: int, count: int, rows: Sequence[str] = (), columns: Sequence[str] = ()
) -> Plan:
    """Lay out a sheet of `lines` rows of `count` images each, before there are images.

    Raises:
        UserError: it would be too large for viewers.
    """
    width, height = cell
    font = _font(width)
    heads = [_wrap(label, font, width) for label in columns]
    fitting = max(1, height // (_size("X\nX", font)[1] - _size("X", font)[1]))
    sides = [_wrap(label, font, max(128, width), fitting) for label in rows]
    left = max((_size(side, font)[0] for side in sides), default=0) + 4 * GAP if sides else 0
    top = max((_size(head, font)[1] for head in heads), default=0) + 2 * GAP if heads else 0
    size = (left + count * (width + GAP) + GAP, top + lines * (height + GAP) + GAP)
    if max(size) > LARGEST:
        raise UserError(
            f"the grid would be {size[0]}×{size[1]} pixels (at most {LARGEST} a side): choose fewer or smaller images"
        )
    return Plan(font, heads, sides, left, top, size)


def _font(width: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=max(10, min(32, width // 16)))


def _size(text: str, font: Any) -> tuple[int, int]:
    box = ImageDraw.Draw(Image.new("L", (1, 1))).multiline_textbbox((0, 0), text, font)
    return math.ceil(box[2] - box[0]), math.ceil(box[3] - box[1])


def _wrap(text: str, font: Any, width: int, lines: int = 3) -> str:
    """Break a label into lines about `width` pixels wide, and cut it after `lines` of them."""
    letters = max(4, int(width / max(1.0, _size("n" * 20, font)[0] / 20)))
    return "\n".join(textwrap.wrap(text, letters, max_lines=lines, placeholder="…")) or " "
