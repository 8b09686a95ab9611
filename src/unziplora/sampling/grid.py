"""Labeled grids of images: strength × strength, or prompts × seeds."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

from PIL import Image

from unziplora.config.sample import GridConfig
from unziplora.images.sheet import plan_sheet, sheet
from unziplora.models.base import Base
from unziplora.sampling.pipeline import StepCallback, decode, generate_latents, nested_progress
from unziplora.sampling.sample import Sample, describe, write_image
from unziplora.sampling.session import SamplingSession, open_session


def grid(config: GridConfig, base: Base | None = None, progress: StepCallback | None = None) -> Path:
    """Write the sheet of `draw_grid` as a PNG that contains its settings, and return the file's path."""
    drawn = draw_grid(config, base, progress)
    return write_image(drawn.image, config.out, drawn.text)


def draw_grid(config: GridConfig, base: Base | None = None, progress: StepCallback | None = None) -> Sample:
    """Generate the images of a grid and put them on one labeled sheet.

    Args:
        base: replaces the configured base.

    Raises:
        UserError: a LoRA, the base or a prompt is missing, damaged or does not fit.
        MachineError: out of memory.
    """
    with open_session(config, base) as session:
        down, across = ([(axis, value) for value in _values(config, axis)] for axis in config.axes())
        cells = [dict(pair) for pair in product(down, across)]
        labels = [_label(*row, session) for row in down], [_label(*column, session) for column in across]
        side = session.base.resolution
        plan_sheet((session.settings.width or side, session.settings.height or side), len(down), len(across), *labels)
        images = [
            _cell(config, session, cell, nested_progress(progress, number, len(cells)))
            for number, cell in enumerate(cells)
        ]
        rows = [images[start : start + len(across)] for start in range(0, len(images), len(across))]
        drawn = sheet(rows, *labels)
        text = describe(config, session, session.prompts[0], images[0], config.seeds[0])
    return Sample(drawn, config.out.stem, text)


def _values(config: GridConfig, axis: str) -> list[Any]:
    if axis == "prompt":
        return list(range(max(1, len(config.prompts))))
    return list({"seed": config.seeds}.get(axis) or getattr(config, f"{axis}s"))


def _cell(
    config: GridConfig, session: SamplingSession, cell: dict[str, Any], report: StepCallback | None
) -> Image.Image:
    """Generate the image of a cell; settings that no axis changes are as configured."""
    strengths = {name: cell[f"{name}_strength"] for name in session.loras.names if f"{name}_strength" in cell}
    session.loras.set_strengths(**strengths)
    prompts = session.prompts[cell.get("prompt", 0)]
    seed = cell.get("seed", config.seeds[0])
    latents = generate_latents(session.base, prompts, [seed], session.settings, report)
    return decode(session.base, latents)[0]


def _label(axis: str, value: Any, session: SamplingSession) -> str:
    if axis == "prompt":
        return session.prompts[value].full
    return f"{axis.removesuffix('_strength')} {value if axis == 'seed' else format(value, 'g')}"
