"""Labelled grids of pictures, and the job `grid`: strength × strength, or prompts × seeds."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from unziplora.config.sample import GridConfig
from unziplora.errors import UserError
from unziplora.models.base import Base
from unziplora.models.text import Prompts
from unziplora.sampling.pipeline import StepCallback, decode, generate_latents, part
from unziplora.sampling.sample import Session, describe, open_session, write_picture

INK, PAPER = (32, 32, 32), (255, 255, 255)
GAP = 4
LARGEST = 16_000  # pixels per side; viewers and PNG libraries give up not far above


def sheet(
    images: Sequence[Sequence[Image.Image | None]], rows: Sequence[str] = (), columns: Sequence[str] = ()
) -> Image.Image:
    """Put pictures into a grid with row labels on the left and column labels on top.

    Args:
        images: rows of pictures, top to bottom; rows may be short, None leaves a gap. Each cell is as large
            as the largest picture; smaller ones are centred.
        rows: one label per row, or none at all.
        columns: one label per column, or none at all.

    Raises:
        UserError: there are no pictures, or the sheet would be too large for viewers.
    """
    pictures = [picture for row in images for picture in row if picture is not None]
    if not pictures:
        raise UserError("a grid needs at least one picture")
    width, height = max(p.width for p in pictures), max(p.height for p in pictures)
    count = max(len(row) for row in images)
    font = _font(width)
    heads = [_wrap(label, font, width) for label in columns]
    fitting = max(1, height // (_size("X\nX", font)[1] - _size("X", font)[1]))
    sides = [_wrap(label, font, max(128, width), fitting) for label in rows]
    left = max((_size(side, font)[0] for side in sides), default=0) + 4 * GAP if sides else 0
    top = max((_size(head, font)[1] for head in heads), default=0) + 2 * GAP if heads else 0
    size = (left + count * (width + GAP) + GAP, top + len(images) * (height + GAP) + GAP)
    if max(size) > LARGEST:
        raise UserError(f"the grid would be {size[0]}×{size[1]} pixels: fewer or smaller pictures, please")
    canvas = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(canvas)
    for column, head in enumerate(heads):
        centre = left + GAP + column * (width + GAP) + width / 2
        draw.multiline_text((centre, top / 2), head, INK, font, anchor="mm", align="center")
    for row, line in enumerate(images):
        y = top + GAP + row * (height + GAP)
        if row < len(sides):
            draw.multiline_text((left / 2, y + height / 2), sides[row], INK, font, anchor="mm", align="center")
        for column, picture in enumerate(line):
            if picture is not None:
                x = left + GAP + column * (width + GAP) + (width - picture.width) // 2
                canvas.paste(picture.convert("RGB"), (x, y + (height - picture.height) // 2))
    return canvas


def grid(config: GridConfig, base: Base | None = None, progress: StepCallback | None = None) -> Path:
    """Make a labelled grid and write it as one PNG that carries its settings; return the file's path.

    Args:
        base: sample with this one, instead of loading the configured one.

    Raises:
        UserError: something given does not exist, is damaged, or does not fit together.
        MachineError: out of memory, disk full, no permission.
    """
    with open_session(config, base) as session:
        across, down = ([(axis, value) for value in _values(config, axis)] for axis in reversed(config.axes()))
        cells = [[{**dict([row]), **dict([column])} for column in across] for row in down]
        total = len(down) * len(across)
        images: list[list[Image.Image]] = []
        for y, line in enumerate(cells):
            images.append([])
            for x, cell in enumerate(line):
                report = part(progress, y * len(across) + x, total)
                images[-1].append(_cell(config, session, cell, report))
        picture = sheet(
            images, [_label(*row, session) for row in down], [_label(*column, session) for column in across]
        )
        text = describe(config, session, session.prompts[0], images[0][0], config.seeds[0])
    return write_picture(picture, config.out, text)


def _values(config: GridConfig, axis: str) -> list[Any]:
    if axis == "prompt":
        return list(range(max(1, len(config.prompts))))
    return list({"seed": config.seeds}.get(axis) or getattr(config, f"{axis}s"))


def _cell(config: GridConfig, session: Session, cell: dict[str, Any], report: StepCallback | None) -> Image.Image:
    """One picture: what an axis does not say is as configured."""
    dials = {name: cell[f"{name}_strength"] for name in session.mounted.names if f"{name}_strength" in cell}
    session.mounted.turn(**dials)
    prompts = session.prompts[cell.get("prompt", 0)]
    seed = cell.get("seed", config.seeds[0])
    latents = generate_latents(session.base, prompts, [seed], replace(session.settings, batch_size=1), report)
    return decode(session.base, latents)[0]


def _label(axis: str, value: Any, session: Session) -> str:
    if axis == "prompt":
        prompts: Prompts = session.prompts[value]
        return prompts.full
    return f"{axis.removesuffix('_strength')} {value if axis == 'seed' else format(value, 'g')}"


def _font(width: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=max(10, min(32, width // 16)))


def _size(text: str, font: Any) -> tuple[int, int]:
    box = ImageDraw.Draw(Image.new("L", (1, 1))).multiline_textbbox((0, 0), text, font)
    return math.ceil(box[2] - box[0]), math.ceil(box[3] - box[1])


def _wrap(text: str, font: Any, width: int, lines: int = 3) -> str:
    """Break a label into lines about `width` pixels wide, and cut it after a number of them."""
    letters = max(4, int(width / max(1.0, _size("n" * 20, font)[0] / 20)))
    return "\n".join(textwrap.wrap(text, letters, max_lines=lines, placeholder="…")) or " "
