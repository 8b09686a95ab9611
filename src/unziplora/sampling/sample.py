"""The job `sample`: LoRAs from run folders or files, pictures to a folder, each with its settings inside."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from PIL import Image, PngImagePlugin

from unziplora.config.recipe import KINDS
from unziplora.config.sample import GenerationConfig, GridConfig, SampleConfig, read_blocks
from unziplora.errors import UserError
from unziplora.formats.files import read_lora
from unziplora.formats.safetensors import body_hash
from unziplora.lora.weights import check_strengths
from unziplora.models.base import Base, load_base
from unziplora.models.device import computing_on, pick_device, pick_dtype
from unziplora.models.folder import read_json
from unziplora.models.sizes import base_folder
from unziplora.models.text import Prompts
from unziplora.runs.folder import MERGED
from unziplora.sampling.adapters import AttachedLoras, Part
from unziplora.sampling.pipeline import Settings, StepCallback, decode, generate, generate_latents
from unziplora.sampling.sources import Source, choose_base, find_source, guidance, plan, with_metadata
from unziplora.utils.files import absolute, atomic_write, file_stem

__all__ = ["Session", "Settings", "StepCallback", "decode", "generate", "generate_latents", "open_session", "sample"]


@dataclass(frozen=True)
class Session:
    """A base with the LoRAs of a configuration in it, and the prompts to sample.

    Attributes:
        base: with the LoRAs at the configured strengths.
        mounted: the dials of the LoRAs 'content' and 'style', those that are given.
        prompts: one entry per picture of a seed.
        settings: how to sample.
        hashes: of each LoRA's file, by a name that tells nothing of the machine.
    """

    base: Base
    mounted: AttachedLoras
    prompts: list[Prompts]
    settings: Settings
    hashes: dict[str, str]


@contextmanager
def open_session(config: GenerationConfig, base: Base | None = None) -> Iterator[Session]:
    """Load base and LoRAs for sampling; a base that is given is used as it is, and left as it was.

    Raises:
        UserError, MachineError: as `load_base`, `read_lora`, `AttachedLoras` and `plan`.
    """
    sources = find_sources(config)
    if base is None:
        known = with_headers(config, sources)
        prompts = plan(config, known)
        device = pick_device(config.device)
        base = load_base(choose_base(config, known), pick_dtype(config.precision, device), device)
    loras = [read_lora(source.file, base.unet.config) for source in sources]
    sources = [with_metadata(source, lora.metadata) for source, lora in zip(sources, loras, strict=True)]
    prompts = plan(config, sources)
    parts = [
        Part(source.kind, lora, blocks_of(config, source), str(source.file))
        for source, lora in zip(sources, loras, strict=True)
    ]
    hashes = {
        shared_name(source.file): lora.metadata.get("sshs_model_hash") or body_hash(source.file)
        for source, lora in zip(sources, loras, strict=True)
    }
    with computing_on(base.device):
        mounted = AttachedLoras(base, parts, separate=prompts[0].separate)
        try:
            mounted.turn(**strengths(config, sources))
            yield Session(base, mounted, prompts, settings(config, sources), hashes)
        finally:
            mounted.remove()


def find_sources(config: GenerationConfig) -> list[Source]:
    """The LoRAs of a configuration, content first. Errors as in `find_source`."""
    return [find_source(path, kind) for kind in KINDS if (path := getattr(config, kind)) is not None]


def with_headers(config: GenerationConfig, sources: list[Source]) -> list[Source]:
    """The sources with their files' headers; of a base that is given no more than the configuration is read.

    Raises:
        UserError: a file is no LoRA, or has no block of a name whose strength is configured; no such base.
    """
    folder = base_folder(config.base) if config.base else None
    shape = read_json(folder / "unet" / "config.json") if folder else None
    loras = [read_lora(source.file, shape) for source in sources]
    for source, lora in zip(sources, loras, strict=True):
        check_strengths(lora, blocks_of(config, source), str(source.file))
    return [with_metadata(source, lora.metadata) for source, lora in zip(sources, loras, strict=True)]


def blocks_of(config: GenerationConfig, source: Source) -> dict[str, float]:
    """The strengths of a LoRA's blocks."""
    return read_blocks(getattr(config, f"{source.kind}_blocks"))


def strengths(config: GenerationConfig, sources: list[Source]) -> dict[str, float]:
    """The strengths of the LoRAs that are there, by kind."""
    return {source.kind: getattr(config, f"{source.kind}_strength") for source in sources}


def settings(config: GenerationConfig, sources: list[Source]) -> Settings:
    """The part of a configuration that says how to sample."""
    given = {"steps", "guidance_rescale", "negative", "width", "height", "scheduler", "batch_size"}
    return Settings(guidance=guidance(config, sources), **config.model_dump(include=given))


@dataclass(frozen=True)
class Sample:
    """A generated image.

    Attributes:
        image: its `info` contains the settings too.
        name: the file's name without its ending.
        text: the settings as PNG text entries: `parameters` as A1111 reads them, and `unziplora` as JSON.
    """

    image: Image.Image
    name: str
    text: dict[str, str]

    def __post_init__(self) -> None:
        self.image.info.update(self.text)


def sample(config: SampleConfig, base: Base | None = None, progress: StepCallback | None = None) -> list[Path]:
    """Generate one image per prompt and seed and write it as `<seed>.png`, or `<prompt>-<seed>.png` for several.

    An existing file with other settings stays: the new one gets a number. Arguments and errors are those of
    `generate_samples`.
    """
    check_out(config)
    samples = generate_samples(config, base, progress)
    return [write_image(made.image, config.out / f"{made.name}.png", made.text) for made in samples]


def generate_samples(
    config: SampleConfig, base: Base | None = None, progress: StepCallback | None = None
) -> Iterator[Sample]:
    """Generate one image per prompt and seed, prompt by prompt.

    Args:
        base: sample with this one, instead of loading the configured one.

    Raises:
        UserError: something given does not exist, is damaged, or does not fit together.
        MachineError: out of memory.
    """
    with open_session(config, base) as session:
        size = config.batch_size
        batches = [config.seeds[start : start + size] for start in range(0, len(config.seeds), size)]
        tasks = [(number, prompts, seeds) for number, prompts in enumerate(session.prompts, 1) for seeds in batches]
        done, total = 0, len(session.prompts) * len(config.seeds) * config.steps
        for number, prompts, seeds in tasks:
            report = _shift(progress, done, total)
            latents = generate_latents(session.base, prompts, seeds, session.settings, report)
            for seed, image in zip(seeds, decode(session.base, latents), strict=True):
                name = f"{number:02d}-{seed}" if len(session.prompts) > 1 else str(seed)
                yield Sample(image, name, describe(config, session, prompts, image, seed))
            done += len(seeds) * config.steps


def check_out(config: GenerationConfig) -> None:
    """Refuse a file in the place of the folder for the pictures; a grid is a file itself.

    Raises:
        UserError: a file is there.
    """
    if not isinstance(config, GridConfig) and config.out.exists() and not config.out.is_dir():
        raise UserError(f"--out {config.out} is a file; give a folder for the pictures")


def _shift(progress: StepCallback | None, before: int, total: int) -> StepCallback | None:
    """Report a batch's steps as part of the whole job."""
    return None if progress is None else lambda done, _: progress(before + done, total)


def describe(
    config: GenerationConfig, session: Session, prompts: Prompts, picture: Image.Image, seed: int
) -> dict[str, str]:
    """What a PNG says of itself: `parameters` as A1111 and its kin read it, `unziplora` as JSON."""
    base, guidance = session.base, session.settings.guidance
    lines = [prompts.full]
    if config.negative:
        lines.append(f"Negative prompt: {config.negative}")
    hashes = ", ".join(f"{name}: {hash[:12]}" for name, hash in session.hashes.items())
    lines.append(
        f"Steps: {config.steps}, Sampler: {config.scheduler}, CFG scale: {guidance:g}, Seed: {seed}, "
        f"Size: {picture.width}x{picture.height}, Model: {base.name}, "
        + (f'Lora hashes: "{hashes}", ' if hashes else "")
        + f"Version: unziplora {version('unziplora')}"
    )
    told = config.model_dump(mode="json", exclude={"out", "seeds", "prompts", "device", "batch_size", *KINDS})
    told.update(
        seed=seed,
        guidance=guidance,
        base=base.name,
        loras=session.hashes,
        prompt=prompts.full,
        content_prompt=prompts.content,
        style_prompt=prompts.style,
        width=picture.width,
        height=picture.height,
        version=version("unziplora"),
    )
    return {"parameters": "\n".join(lines), "unziplora": json.dumps(told, sort_keys=True, ensure_ascii=False)}


def shared_name(file: Path) -> str:
    """A LoRA file as others may know it: its name, after that of its run if every run has a file of that name."""
    path = absolute(file)
    stem = file_stem(path)
    return f"{path.parent.name}-{stem}" if stem in (*KINDS, MERGED) else stem


def write_image(picture: Image.Image, path: Path, text: dict[str, str]) -> Path:
    """Write a PNG with text entries atomically; return where: a number is added if another picture is there.

    Raises:
        MachineError: disk full, no permission.
    """
    free, number = path, 1
    while free.exists() and _text(free) != text:
        number += 1
        free = path.with_stem(f"{path.stem}-{number}")
    info = PngImagePlugin.PngInfo()
    for name, value in text.items():
        info.add_itxt(name, value)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", pnginfo=info)
    atomic_write(free, buffer.getvalue())
    return free


def _text(path: Path) -> dict[str, str]:
    try:
        with Image.open(path) as picture:
            picture.load()
            return {name: str(value) for name, value in getattr(picture, "text", {}).items()}
    except OSError:
        return {}
