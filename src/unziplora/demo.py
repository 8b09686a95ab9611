"""The job that `make demo` runs: split the two pictures that ship with the package, and show what came out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from pydantic import BaseModel

from unziplora.beside import beside
from unziplora.config.recipe import KINDS, read_toml, resolve
from unziplora.config.sample import SampleConfig
from unziplora.config.split import PRESETS, SplitConfig
from unziplora.errors import Interrupted, UserError
from unziplora.images.preprocess import load_image
from unziplora.images.sheet import sheet
from unziplora.methods.unziplora.method import split
from unziplora.models.base import BUNDLED, Base, load_base
from unziplora.models.device import pick_device, pick_dtype
from unziplora.models.sizes import inspect_base
from unziplora.models.tiny_base import save_standin
from unziplora.sampling.pipeline import decode, generate_latents
from unziplora.sampling.sample import open_session
from unziplora.utils.files import write_png
from unziplora.utils.progress import Callback, Progress, duration

DEMO = BUNDLED / "demo"
READABLE = 256
"""Least side in pixels at which a label above a picture is readable in full."""
NOISE = (
    "This installation has no bundled base: an untrained one of the same topology stands in, so the pictures below "
    "are NOISE. They show that everything runs, not what it can do."
)


class Demo(BaseModel):
    """What the demo made.

    Attributes:
        runs: the run folders of the two pictures.
        strip: what the LoRAs of both do, in one row of pictures.
        noise: an untrained base stood in, so the pictures mean nothing.
        seconds: of the whole demo.
    """

    runs: list[Path]
    strip: Path
    noise: bool
    seconds: float

    def __str__(self) -> str:
        rows = [f"{kind:<8} {run / kind}.safetensors" for run in self.runs for kind in KINDS]
        rows += [
            f"strip    {self.strip}",
            f"done in {duration(self.seconds)}" + (". " + NOISE if self.noise else ""),
        ]
        return "\n".join(rows)


def demo(
    out: str | Path = "runs/demo", base: str = "bundled", steps: int | None = None, progress: Callback | None = None
) -> Demo:
    """Split the two shipped pictures on the bundled base and write a strip of what the LoRAs do.

    Args:
        out: folder of the two runs; where it is taken, the next free number is appended.
        base: another base to try it on.
        steps: instead of the preset's; fewer, for the style's words too.
        progress: see `split`.

    Raises:
        UserError, MachineError, Interrupted: as `split`.
    """
    start = time.monotonic()
    report = progress or (lambda _: None)
    if base != "bundled":
        inspect_base(base)  # one that is not there is told before a folder is made
    folder = free_folder(Path(out))
    noise = base == "bundled" and not (BUNDLED / "emoji-xl" / "model_index.json").is_file()
    if noise:
        report(Progress(0, 0, message=NOISE))
        base = str(save_standin(folder / ".stand-in").resolve())
    given: dict[str, Any] = {"base": base, "preset": "bundled", "sample_seeds": []}
    if steps:
        given |= {"steps": steps, "phrase_steps": min(steps, PRESETS["bundled"]["phrase_steps"])}
    configs = [
        resolve(SplitConfig, {"images": [DEMO / f"{name}.png"]}, words, {**given, "out": folder / name})
        for name, words in read_toml(DEMO / "words.toml").items()
    ]
    try:
        split_all(configs, report)
    except Interrupted:
        raise Interrupted("the demo was stopped; run it again") from None
    report(Progress(0, 0, message="making the strip"))
    strip = folder / "strip.png"
    write_png(strip, make_strip(configs[0], configs[1]))
    return Demo(runs=[config.out for config in configs], strip=strip, noise=noise, seconds=time.monotonic() - start)


def split_all(configs: Sequence[SplitConfig], report: Callback) -> None:
    """Split two pictures, on a CPU side by side: there two trainings on half the cores each are done sooner.

    Raises:
        UserError, MachineError, Interrupted: as `split`.
    """
    pictures = [f"a picture of a {config.content} in {config.style} style" for config in configs]
    threads = torch.get_num_threads()
    if threads < 2 or pick_device(configs[0].device).type != "cpu":
        for config, what in zip(configs, pictures, strict=True):
            report(Progress(0, 0, message=f"splitting {what}"))
            split(config, progress=report)
        return
    first, second = configs
    report(Progress(0, 0, message=f"splitting {pictures[0]}, and in another process {pictures[1]}"))
    with beside(second, threads // 2) as wait:
        torch.set_num_threads(threads - threads // 2)
        try:
            split(first, progress=report)
            report(Progress(0, 0, message=f"waiting for {pictures[1]}"))
            wait()
        finally:
            torch.set_num_threads(threads)


def make_strip(config: SplitConfig, other: SplitConfig) -> Image.Image:
    """Input, content alone, style alone, both, and the other picture's content in this style: from the files."""
    device = pick_device(config.device)
    base = load_base(config.base, pick_dtype(config.precision, device), device)
    content = f"{config.fill('a {token} {content}')} in {config.sample_style} style"
    style = config.fill(f"a {config.sample_subject} in {{style}} style")
    pictures = {
        "input": load_image(config.images[0], base.resolution),
        f"this {config.content}, {config.sample_style}": picture(
            base, config, SampleConfig(content=config.out, prompts=[content])
        ),
        f"a {config.sample_subject} in this style": picture(
            base, config, SampleConfig(style=config.out, prompts=[style])
        ),
        "both together": picture(base, config, SampleConfig(content=config.out, style=config.out)),
        "another picture": load_image(other.images[0], base.resolution),
        f"its {other.content} in this style": picture(base, config, SampleConfig(content=other.out, style=config.out)),
    }
    side = base.resolution * -(-READABLE // base.resolution)  # a whole multiple: small pictures, large labels
    large = [made.resize((side, side), Image.Resampling.NEAREST) for made in pictures.values()]
    return sheet([large], columns=list(pictures))


def picture(base: Base, config: SplitConfig, what: SampleConfig) -> Image.Image:
    """The first picture of a sample configuration, on a base that is loaded already."""
    what = what.model_copy(update={"steps": config.sample_steps, "guidance": config.sample_guidance})
    with open_session(what, base) as session:
        return decode(base, generate_latents(base, session.prompts[0], [0], session.settings))[0]


def free_folder(folder: Path) -> Path:
    """The folder, or the first of folder-2, folder-3 … that is not there yet."""
    folder = folder if folder.name else folder.resolve()
    if not folder.name:
        raise UserError(f"{folder}: no folder to write into; name another with --out")
    number, free = 1, folder
    while free.exists():
        number += 1
        free = folder.with_name(f"{folder.name}-{number}")
    return free
