"""The job that `make demo` runs: split the picture that ships with the package, and show what came out."""

from __future__ import annotations

import time
from io import BytesIO
from pathlib import Path

from PIL import Image
from pydantic import BaseModel

from unziplora.atomic import atomic_write
from unziplora.base import BUNDLED, Base, load_base
from unziplora.config import SplitConfig, read_toml, resolve
from unziplora.config_sample import SampleConfig
from unziplora.device import pick_device, pick_dtype
from unziplora.generate import decode, generate_latents
from unziplora.grid import sheet
from unziplora.images import load_picture
from unziplora.progress import Callback, Progress, duration
from unziplora.run import RunFolder
from unziplora.sample import open_session
from unziplora.split import split
from unziplora.standin import save_standin

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
        run: the run folder.
        strip: the picture with input, content alone, style alone, and both together.
        noise: an untrained base stood in, so the pictures mean nothing.
        seconds: of the whole demo.
    """

    run: Path
    strip: Path
    noise: bool
    seconds: float

    def __str__(self) -> str:
        rows = [
            f"content  {self.run / 'content.safetensors'}",
            f"style    {self.run / 'style.safetensors'}",
            f"strip    {self.strip}",
            f"done in {duration(self.seconds)}" + (". " + NOISE if self.noise else ""),
        ]
        return "\n".join(rows)


def demo(
    out: str | Path = "runs/demo", base: str = "bundled", steps: int | None = None, progress: Callback | None = None
) -> Demo:
    """Split the shipped picture on the bundled base and write a strip of what the two LoRAs do.

    Args:
        out: run folder; where it is taken, the next free number is appended.
        base: another base to try it on.
        steps: instead of the preset's.
        progress: see `split`.

    Raises:
        UserError, MachineError, Interrupted: as `split`.
    """
    start = time.monotonic()
    tell = progress or (lambda _: None)
    words = read_toml(DEMO / "words.toml")
    folder = free_folder(Path(out))
    noise = base == "bundled" and not (BUNDLED / "emoji-xl" / "model_index.json").is_file()
    if noise:
        tell(Progress(0, 0, message=NOISE))
        base = str(save_standin(folder / ".stand-in").resolve())
    chosen = {"steps": steps} if steps else {}
    config = resolve(
        SplitConfig,
        {"images": [DEMO / "picture.png"], "preset": "bundled" if noise else "auto", "sample_seeds": []},
        {**words, "base": base, "out": folder, **chosen},
    )
    run = split(config, progress=progress)
    strip = run.path / "strip.png"
    tell(Progress(0, 0, message="making the strip"))
    save(make_strip(run, config), strip)
    return Demo(run=run.path, strip=strip, noise=noise, seconds=time.monotonic() - start)


def make_strip(run: RunFolder, config: SplitConfig) -> Image.Image:
    """Input, content alone in another style, style alone on another subject, and both: from the files alone."""
    device = pick_device(config.device)
    base = load_base(config.base, pick_dtype(config.precision, device), device)
    content = f"{config.fill('a {token} {content}')} in {config.sample_style} style"
    style = config.fill(f"a {config.sample_subject} in {{style}} style")
    pictures = [
        load_picture(config.images[0], base.resolution),
        picture(base, config, SampleConfig(content=run.path, prompts=[content])),
        picture(base, config, SampleConfig(style=run.path, prompts=[style])),
        picture(base, config, SampleConfig(content=run.path, style=run.path)),
    ]
    labels = [
        "input",
        f"its {config.content} in {config.sample_style} style",
        f"a {config.sample_subject} in its style",
        "both together",
    ]
    side = base.resolution * -(-READABLE // base.resolution)  # a whole multiple: small pictures, large labels
    return sheet([[made.resize((side, side), Image.Resampling.NEAREST) for made in pictures]], columns=labels)


def picture(base: Base, config: SplitConfig, what: SampleConfig) -> Image.Image:
    """The first picture of a sample configuration, on a base that is loaded already."""
    what = what.model_copy(update={"steps": config.sample_steps, "guidance": config.sample_guidance})
    with open_session(what, base) as session:
        return decode(base, generate_latents(base, session.prompts[0], [0], session.settings))[0]


def free_folder(folder: Path) -> Path:
    """The folder, or the first of folder-2, folder-3 … in which a run may begin."""
    number, free = 1, folder
    while not RunFolder(free).is_free():
        number += 1
        free = folder.with_name(f"{folder.name}-{number}")
    return free


def save(image: Image.Image, path: Path) -> None:
    """Write a PNG atomically."""
    buffer = BytesIO()
    image.save(buffer, "PNG")
    atomic_write(path, buffer.getvalue())
