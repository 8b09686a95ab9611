"""The demo: split the two images that ship with the package, and show what the LoRAs do."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from pydantic import BaseModel

from unziplora.config.bases import is_bundled
from unziplora.config.recipe import resolve
from unziplora.config.sample import SampleConfig
from unziplora.config.split import PRESETS, SplitConfig
from unziplora.config.templates import in_style
from unziplora.errors import Interrupted, MachineError
from unziplora.images.preprocess import load_image
from unziplora.images.sheet import sheet
from unziplora.methods.unziplora.method import split
from unziplora.models.base import BUNDLED, Base, open_base
from unziplora.models.device import pick_device
from unziplora.models.sizes import inspect_base
from unziplora.runs.folder import RunFolder
from unziplora.sampling.pipeline import decode, generate_latents
from unziplora.sampling.session import open_session
from unziplora.utils.files import free_folder, write_png
from unziplora.utils.inputs import read_toml
from unziplora.utils.progress import Callback, Progress, duration

DEMO = BUNDLED / "demo"
READABLE = 256
"""Smallest side in pixels of an image whose label stays readable in full."""

DURATION = "This takes two to six minutes on two cores of a laptop."


class Demo(BaseModel):
    """Result of the demo.

    Attributes:
        runs: the run folders of the two images.
        strip: a row of images that shows what the LoRAs of both do.
        seconds: duration of the whole demo.
    """

    runs: list[Path]
    strip: Path
    seconds: float

    def __str__(self) -> str:
        rows = [f"{name:<8} {file}" for run in self.runs for name, file in RunFolder(run).loras.items()]
        return "\n".join([*rows, f"strip    {self.strip}", f"done in {duration(self.seconds)}"])


def demo(
    out: str | Path = "runs/demo", base: str = "bundled", steps: int | None = None, progress: Callback | None = None
) -> Demo:
    """Split the two shipped images on the bundled base and write a strip of what the LoRAs do.

    Args:
        out: folder of the two runs; a number is appended where it exists already.
        base: another base to try.
        steps: replaces the preset's number of steps, and limits the steps that learn the style phrase.
        progress: see `split`.

    Raises:
        UserError, MachineError, Interrupted: as `split`.
    """
    start = time.monotonic()
    report = progress or (lambda _: None)
    inspect_base(base)  # a missing base is reported before a folder is created
    folder = free_folder(Path(out))
    settings: dict[str, Any] = {"base": base, "preset": "bundled", "sample_seeds": []}
    if steps:
        settings |= {"steps": steps, "phrase_steps": min(steps, PRESETS["bundled"]["phrase_steps"])}
    configs = [
        resolve(SplitConfig, {"images": [DEMO / f"{name}.png"]}, words, {**settings, "out": folder / name})
        for name, words in read_toml(DEMO / "words.toml").items()
    ]
    if is_bundled(base):
        report(Progress(0, 0, message=DURATION))
    try:
        split_both(configs[0], configs[1], report)
    except Interrupted:
        raise Interrupted("the demo was stopped; run it again") from None
    report(Progress(0, 0, message="drawing the strip"))
    strip = folder / "strip.png"
    write_png(strip, draw_strip(configs[0], configs[1]))
    return Demo(runs=[config.out for config in configs], strip=strip, seconds=time.monotonic() - start)


def split_both(first: SplitConfig, second: SplitConfig, report: Callback) -> None:
    """Split two images, on a CPU side by side: two trainings on half the cores each finish sooner than one by one.

    Raises:
        UserError, MachineError, Interrupted: as `split`.
    """
    titles = [f"a {config.content} in {config.style} style" for config in (first, second)]
    threads = torch.get_num_threads()
    if threads < 2 or pick_device(first.device).type != "cpu":
        for config, title in zip((first, second), titles, strict=True):
            report(Progress(0, 0, message=f"splitting {title}"))
            split(config, progress=report)
        return
    report(Progress(0, 0, message=f"splitting {titles[0]}, and in a second process {titles[1]}"))
    context = multiprocessing.get_context("spawn")  # forked copies of torch's threads hang
    with ProcessPoolExecutor(1, context, _start_process, (threads // 2,)) as pool:
        other = pool.submit(split, second)
        torch.set_num_threads(threads - threads // 2)
        try:
            split(first, progress=report)
            report(Progress(0, 0, message=f"waiting for {titles[1]}"))
            other.result()
        except BrokenProcessPool:
            raise MachineError(
                f"the process that split {titles[1]} ended before its time; it may have run out of memory"
            ) from None
        finally:
            torch.set_num_threads(threads)
            for process in multiprocessing.active_children():
                process.terminate()  # a training that is still running saves its step first


def _start_process(threads: int) -> None:
    """Set up the second process: its share of the cores, and no output between the lines of the first."""
    torch.set_num_threads(threads)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (open until the process ends)


def draw_strip(config: SplitConfig, other: SplitConfig) -> Image.Image:
    """Draw the input, content alone, style alone, both, and the other image's content in this style."""
    base = open_base(config.base, config.precision, config.device)
    content = in_style(config.fill("a {token} {content}"), config.sample_style)
    style = config.fill(f"a {config.sample_subject} in {{style}} style")
    samples = {
        f"this {config.content}, {config.sample_style}": SampleConfig(content=config.out, prompts=[content]),
        f"a {config.sample_subject} in this style": SampleConfig(style=config.out, prompts=[style]),
        "both together": SampleConfig(content=config.out, style=config.out),
        f"its {other.content} in this style": SampleConfig(content=other.out, style=config.out),
    }
    drawn = {title: _draw(base, config, sample) for title, sample in samples.items()}
    last = drawn.popitem()
    images = {
        "input": load_image(config.images[0], base.resolution),
        **drawn,
        "another picture": load_image(other.images[0], base.resolution),
        last[0]: last[1],
    }
    side = base.resolution * -(-READABLE // base.resolution)  # a whole multiple: small images, large labels
    large = [image.resize((side, side), Image.Resampling.NEAREST) for image in images.values()]
    return sheet([large], columns=list(images))


def _draw(base: Base, config: SplitConfig, sample: SampleConfig) -> Image.Image:
    """Generate the first image of a sample configuration on a loaded base."""
    sample = sample.model_copy(update={"steps": config.sample_steps, "guidance": config.sample_guidance})
    with open_session(sample, base) as session:
        return decode(base, generate_latents(base, session.prompts[0], [0], session.settings))[0]
