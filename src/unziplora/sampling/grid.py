"""Labeled grids of images: strength × strength, or prompts × seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from unziplora.config.sample import GridConfig
from unziplora.images.sheet import sheet
from unziplora.models.base import Base
from unziplora.sampling.pipeline import StepCallback, decode, generate_latents, nested_progress
from unziplora.sampling.sample import Sample, describe, write_image
from unziplora.sampling.session import SamplingSession, open_session


def grid(config: GridConfig, base: Base | None = None, progress: StepCallback | None = None) -> Path:
    """Write a labeled grid as one PNG that contains its settings, and return the file's path.

    Arguments and errors are those of `draw_grid`.
    """
    sheet = draw_grid(config, base, progress)
    return write_image(sheet.image, config.out, sheet.text)


def draw_grid(config: GridConfig, base: Base | None = None, progress: StepCallback | None = None) -> Sample:
    """Generate the images of a grid and put them on one labeled sheet.

    Args:
        base: replaces the configured base.

    Raises:
        UserError: a LoRA, the base or a prompt is missing, damaged or does not fit.
        MachineError: out of memory.
    """
    with open_session(config, base) as session:
        across, down = ([(axis, value) for value in _values(config, axis)] for axis in reversed(config.axes()))
        cells = [[{**dict([row]), **dict([column])} for column in across] for row in down]
        total = len(down) * len(across)
        images: list[list[Image.Image]] = []
        for y, line in enumerate(cells):
            images.append([])
            for x, cell in enumerate(line):
                report = nested_progress(progress, y * len(across) + x, total)
                images[-1].append(_cell(config, session, cell, report))
        drawn = sheet(images, [_label(*row, session) for row in down], [_label(*column, session) for column in across])
        text = describe(config, session, session.prompts[0], images[0][0], config.seeds[0])
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
