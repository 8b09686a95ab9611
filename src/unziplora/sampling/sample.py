"""Images generated as configured, each with its settings inside, and their PNG files."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from PIL import Image, PngImagePlugin

from unziplora.config.recipe import KINDS
from unziplora.config.sample import GenerationConfig, GridConfig, SampleConfig
from unziplora.errors import UserError
from unziplora.models.base import Base
from unziplora.models.text import Prompts
from unziplora.sampling.pipeline import StepCallback, decode, generate_latents, portion
from unziplora.sampling.session import SamplingSession, open_session
from unziplora.utils.files import IMAGE_SUFFIXES, atomic_write, numbered
from unziplora.utils.inputs import open_regular


@dataclass(frozen=True)
class Sample:
    """A generated image, the stem of its file's name, and its settings as PNG text entries (`describe`)."""

    image: Image.Image
    name: str
    text: dict[str, str]

    def __post_init__(self) -> None:
        self.image.info.update(self.text)

    def save(self, folder: Path) -> Path:
        """Write the image into a folder; errors and numbering as in `write_image`."""
        return write_image(self.image, folder / f"{self.name}.png", self.text)


def sample(config: SampleConfig, base: Base | None = None, progress: StepCallback | None = None) -> list[Path]:
    """Generate one image per prompt and seed and write it as `<seed>.png`, or `<prompt>-<seed>.png` for several.

    An existing file with other settings stays: the new one gets a number. Arguments and errors are those of
    `generate_samples`.
    """
    check_out(config)
    return [image.save(config.out) for image in generate_samples(config, base, progress)]


def generate_samples(
    config: SampleConfig, base: Base | None = None, progress: StepCallback | None = None
) -> Iterator[Sample]:
    """Generate one image per prompt and seed, prompt by prompt.

    Args:
        base: replaces the configured base.

    Raises:
        UserError: a LoRA, the base or a prompt is missing, damaged or does not fit.
        MachineError: out of memory.
    """
    with open_session(config, base) as session:
        size = config.batch_size
        batches = [config.seeds[start : start + size] for start in range(0, len(config.seeds), size)]
        tasks = [(number, prompts, seeds) for number, prompts in enumerate(session.prompts, 1) for seeds in batches]
        done, total = 0, len(session.prompts) * len(config.seeds) * config.steps
        for number, prompts, seeds in tasks:
            report = portion(progress, done, total)
            latents = generate_latents(session.base, prompts, seeds, session.settings, report)
            for seed, image in zip(seeds, decode(session.base, latents), strict=True):
                name = f"{number:02d}-{seed}" if len(session.prompts) > 1 else str(seed)
                yield Sample(image, name, describe(config, session, prompts, image, seed))
            done += len(seeds) * config.steps


def check_out(config: GenerationConfig) -> None:
    """Refuse a file in place of the folder for images; a grid is a file itself.

    Raises:
        UserError: there is a file of that name, or the name is an image's.
    """
    if isinstance(config, GridConfig) or config.out.is_dir():
        return
    if config.out.exists() or config.out.suffix.lower() in IMAGE_SUFFIXES:
        raise UserError(f"--out {config.out} is a file; give a folder for the images")


def describe(
    config: GenerationConfig, session: SamplingSession, prompts: Prompts, image: Image.Image, seed: int
) -> dict[str, str]:
    """Return the settings of an image of a session as PNG text entries (`settings_text`)."""
    guidance, hashes, kinds = session.settings.guidance, session.hashes, session.kinds
    return settings_text(config, session.base.name, guidance, hashes, kinds, prompts, image.size, seed)


def settings_text(
    config: GenerationConfig,
    base: str,
    guidance: float,
    hashes: Mapping[str, str],
    kinds: Mapping[str, str],
    prompts: Prompts,
    size: tuple[int, int],
    seed: int,
) -> dict[str, str]:
    """Return an image's settings as PNG text entries: `parameters` as A1111 reads them, and `unziplora` as JSON.

    Args:
        base: name of the base.
        guidance: the one that was used, whatever the configuration leaves open.
        hashes: hash of each LoRA's file by its name.
        kinds: these names by kind, content or style.
        size: width and height in pixels.
    """
    lines = [prompts.full]
    if config.negative:
        lines.append(f"Negative prompt: {config.negative}")
    short = ", ".join(f"{name}: {hash[:12]}" for name, hash in hashes.items())
    lines.append(
        f"Steps: {config.steps}, Sampler: {config.scheduler}, CFG scale: {guidance:g}, Seed: {seed}, "
        f"Size: {size[0]}x{size[1]}, Model: {base}, "
        + (f'Lora hashes: "{short}", ' if short else "")
        + f"Version: unziplora {version('unziplora')}"
    )
    settings = config.model_dump(mode="json", exclude={"out", "seeds", "prompts", "device", "batch_size", *KINDS})
    settings.update(
        kinds,
        seed=seed,
        guidance=guidance,
        base=base,
        loras=dict(hashes),
        prompt=prompts.full,
        content_prompt=prompts.content,
        style_prompt=prompts.style,
        width=size[0],
        height=size[1],
        version=version("unziplora"),
    )
    return {"parameters": "\n".join(lines), "unziplora": json.dumps(settings, sort_keys=True, ensure_ascii=False)}


def write_image(image: Image.Image, path: Path, text: dict[str, str]) -> Path:
    """Write a PNG with text entries atomically; return its path, with a number if another image has that name.

    Raises:
        MachineError: disk full, no permission.
    """
    free = next(one for one in numbered(path, path.suffix) if not one.exists() or _has_text(one, text))
    info = PngImagePlugin.PngInfo()
    for name, value in text.items():
        info.add_itxt(name, value)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    atomic_write(free, buffer.getvalue())
    return free


def _has_text(path: Path, text: dict[str, str]) -> bool:
    """Return True for a PNG with these text entries; its pixels are not decoded, whatever the file is."""
    try:
        with open_regular(path) as file, Image.open(file, formats=["PNG"]) as image:
            return {name: image.info.get(name) for name in text} == text
    except Exception:  # Pillow raises nearly anything on damaged files, and on too large ones
        return False
