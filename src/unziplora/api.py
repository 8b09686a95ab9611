"""The Python front door: one function per command, with the keys of its configuration as keywords.

Every function takes the keys that its configuration declares (`SplitConfig`, `SampleConfig` …). Unknown keys are
errors.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from PIL import Image

from unziplora.config.bases import HUB_ID
from unziplora.config.blora import BLoraConfig
from unziplora.config.dreambooth import DreamBoothConfig
from unziplora.config.probe import ProbeConfig
from unziplora.config.recipe import Precision, Recipe, resolve
from unziplora.config.sample import GridConfig, SampleConfig
from unziplora.config.split import SplitConfig
from unziplora.config.training import TrainingConfig
from unziplora.config.zip import ZipConfig
from unziplora.errors import UserError
from unziplora.formats.convert import convert
from unziplora.formats.convert import resize_file as resize
from unziplora.formats.files import read_lora, write_lora
from unziplora.formats.inspect import inspect
from unziplora.jobs.batch import Result, default_folder, run_batch
from unziplora.jobs.queue import Queue, refuse_waiting
from unziplora.jobs.remote import EngineName, pick_engine
from unziplora.jobs.rows import read_rows
from unziplora.jobs.state import find_runs
from unziplora.jobs.trainings import Trainer, function_of
from unziplora.jobs.worker import Work
from unziplora.jobs.worker import work as work_on
from unziplora.models import base as bases
from unziplora.models.base import Base, borrowed
from unziplora.probe import probe
from unziplora.runs.folder import RunFolder
from unziplora.sampling import grid as grids
from unziplora.sampling import sample as samples
from unziplora.sampling.sources import loras_of
from unziplora.utils.files import file_stem, free_folder, safe_name
from unziplora.utils.progress import Callback, counted, show

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline

    from unziplora.probe.scores import Findings

# fmt: off
__all__ = [
    "Queue", "Run", "batch", "convert", "find_blocks", "find_runs", "grid", "inspect", "load_base", "read_lora",
    "resize", "sample", "split", "train_blora", "train_dreambooth", "work", "write_lora", "zip_loras",
]
# fmt: on

C = TypeVar("C", bound=Recipe)
Location = str | os.PathLike[str]
ImageSource = Location | Image.Image
LoraSource = Location | RunFolder


@dataclass(frozen=True)
class Run(RunFolder):
    """A finished run on disk; a notebook displays its last sample sheet.

    Attributes:
        path: the run folder.
        content, style: its LoRA files.
    """

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path).expanduser())

    def load_into(
        self, pipe: StableDiffusionXLPipeline, *, content: float | None = 1.0, style: float | None = 1.0
    ) -> None:
        """Load the LoRAs into a diffusers pipeline, as adapters named `content` and `style`.

        An adapter of the same name is replaced, and at strength 0 removed; all others stay as they are. None leaves a
        LoRA out: `cat.load_into(pipe, style=None)` and then `fox.load_into(pipe, content=None)` combine two runs. A
        merged run is one adapter, `lora`, at the strength `content`.

        Raises:
            UserError: there are no LoRAs, or a file is damaged or does not fit the pipeline.
        """
        if not self.loras:
            raise UserError(f"{self.path}: no finished run with LoRAs is here")
        from unziplora.sampling.pipelines import load_adapter, remove_adapter

        strengths = {"content": content, "style": style, "lora": content}
        for name, file in self.loras.items():
            if strength := strengths[name]:
                load_adapter(pipe, name, read_lora(file, pipe.unet.config), strength)
            elif strength is not None:
                remove_adapter(pipe, name)

    def _repr_png_(self) -> bytes | None:
        return self.sheets[-1].read_bytes() if self.sheets else None


def split(
    images: ImageSource | Sequence[ImageSource] = (),
    *,
    content: str | None = None,
    style: str | None = None,
    out: Location | None = None,
    base: Location | Base | None = None,
    pipe: StableDiffusionXLPipeline | None = None,
    resume: bool = False,
    extend: int = 0,
    progress: bool | Callback = True,
    **settings: Any,
) -> Run:
    """Split an image into a content LoRA and a style LoRA (UnZipLoRA, arXiv 2412.04465).

    Args:
        images: a file or a PIL image, or several of one subject in one style.
        content: a word for the subject, such as "cat".
        style: a phrase for the style, such as "pencil sketch".
        out: run folder to create; default: `runs/NAME` after the image file or the subject, with a number if taken.
        base: 'bundled', a diffusers folder, a .safetensors file, a hub id, or a loaded base; default: SDXL base 1.0.
        pipe: an SDXL pipeline in memory, used instead of a base and left as it was.
        resume: continue the interrupted run in `out`.
        extend: train the finished run in `out` on by so many steps.
        progress: show it (a bar, or lines where nobody watches), or a function called with every `Progress`.
        settings: further keys of `SplitConfig`, such as `rank=32` or `preset="paper"`.

    Raises:
        UserError: an image, a word, the base, the folder or a setting cannot be used.
        MachineError: disk full, no permission, out of memory.
        Interrupted: stopped on request after saving; `resume=True` continues.
    """
    words = {"content": content, "style": style}
    return _train(SplitConfig, images, {**words, **settings}, out, base, pipe, resume, extend, progress)


def train_dreambooth(
    images: ImageSource | Sequence[ImageSource] = (),
    *,
    content: str | None = None,
    style: str | None = None,
    out: Location | None = None,
    base: Location | Base | None = None,
    pipe: StableDiffusionXLPipeline | None = None,
    resume: bool = False,
    extend: int = 0,
    progress: bool | Callback = True,
    **settings: Any,
) -> Run:
    """Train one LoRA on images of a subject, of a style, or of both (DreamBooth, arXiv 2208.12242).

    Arguments and errors are those of `split`; further keys are those of `DreamBoothConfig`.
    """
    settings = {"content": content, "style": style, **settings}
    return _train(DreamBoothConfig, images, settings, out, base, pipe, resume, extend, progress)


def train_blora(
    images: ImageSource | Sequence[ImageSource] = (),
    *,
    out: Location | None = None,
    base: Location | Base | None = None,
    pipe: StableDiffusionXLPipeline | None = None,
    resume: bool = False,
    extend: int = 0,
    progress: bool | Callback = True,
    **settings: Any,
) -> Run:
    """Train a content and a style LoRA of one block each on an image, without words (B-LoRA, arXiv 2403.14572).

    Arguments and errors are those of `split`; further keys are those of `BLoraConfig`.
    """
    return _train(BLoraConfig, images, settings, out, base, pipe, resume, extend, progress)


def zip_loras(
    content: LoraSource | None = None,
    style: LoraSource | None = None,
    *,
    out: Location | None = None,
    base: Location | Base | None = None,
    pipe: StableDiffusionXLPipeline | None = None,
    resume: bool = False,
    extend: int = 0,
    progress: bool | Callback = True,
    **settings: Any,
) -> Run:
    """Merge a content LoRA and a style LoRA into one (ZipLoRA, arXiv 2311.13600; or a sum with `method="direct"`).

    Arguments and errors are those of `split`, with two runs or LoRA files instead of images; further keys are those
    of `ZipConfig`.
    """
    loras = {"content_lora": content, "style_lora": style}
    paths = {name: path for name, source in loras.items() if (path := _lora_path(source))}
    name = "-".join(path.name.removesuffix(".safetensors") for path in paths.values())
    return _train(ZipConfig, (), {**paths, **settings}, out, base, pipe, resume, extend, progress, name)


def sample(
    run: LoraSource | None = None,
    *,
    content: LoraSource | None = None,
    style: LoraSource | None = None,
    prompts: str | Sequence[str] = (),
    out: Location | None = None,
    base: Location | Base | None = None,
    pipe: StableDiffusionXLPipeline | None = None,
    progress: bool | Callback = True,
    **settings: Any,
) -> list[Image.Image]:
    """Generate images with a content LoRA, a style LoRA, or both; each contains its settings in `image.info`.

    Args:
        run: a run whose content and style are used, or one LoRA file.
        content, style: a run or LoRA file for the content, and one for the style.
        prompts: one or several; {token}, {content} and {style} stand for the runs' words. Default: the runs' own.
        out: folder in which the images are saved too.
        base, pipe, progress: see `split`; the default base is the one that the LoRAs were trained on.
        settings: further keys of `SampleConfig`, such as `seeds=[0, 1]` or `style_strength=0.8`.

    Raises:
        UserError: a file, a word or a setting cannot be used.
        MachineError: out of memory, disk full, no permission.
    """
    keys = _sample_keys(run, content, style, prompts, out, settings)
    with _prepared(SampleConfig, {}, keys, base, pipe, progress) as (config, loaded, view):
        if out is not None:
            samples.check_out(config)
        images = []
        for made in samples.generate_samples(config, loaded, counted(view)):
            images.append(made.image)
            if out is not None:
                made.save(config.out)
        return images


def grid(
    run: LoraSource | None = None,
    *,
    content: LoraSource | None = None,
    style: LoraSource | None = None,
    prompts: str | Sequence[str] = (),
    out: Location | None = None,
    base: Location | Base | None = None,
    pipe: StableDiffusionXLPipeline | None = None,
    progress: bool | Callback = True,
    **settings: Any,
) -> Image.Image:
    """Generate one labeled sheet of images: strength by strength, or prompts by seeds.

    Arguments and errors are those of `sample`, where `out` is the PNG file to save too; further keys are those of
    `GridConfig`.
    """
    keys = _sample_keys(run, content, style, prompts, out, settings)
    with _prepared(GridConfig, {}, keys, base, pipe, progress) as (config, loaded, view):
        sheet = grids.draw_grid(config, loaded, counted(view))
        if out is not None:
            samples.write_image(sheet.image, config.out, sheet.text)
        return sheet.image


def find_blocks(
    base: Location | Base | None = None,
    *,
    out: Location = "blocks",
    pipe: StableDiffusionXLPipeline | None = None,
    progress: bool | Callback = True,
    **settings: Any,
) -> Findings:
    """Find the blocks of a base that decide content and style (B-LoRA's probe, arXiv 2403.14572, section 4).

    Arguments and errors are those of `split`, where `out` is the folder for the block map, the figures and the images;
    further keys are those of `ProbeConfig`.
    """
    with _prepared(ProbeConfig, {}, {"out": out, **settings}, base, pipe, progress) as (config, loaded, view):
        return probe.find_blocks(config, loaded, progress=counted(view))


def batch(
    source: Location,
    *,
    out: Location | None = None,
    engine: EngineName = "local",
    address: str | None = None,
    progress: bool | Callback = True,
    **settings: Any,
) -> list[Result]:
    """Train on many images, one run each, while the base stays loaded; the same call continues an interrupted batch.

    Args:
        source: a folder of images, or a .toml, .csv or .jsonl file whose rows contain image, content, style and any
            other key of `SplitConfig`, or `method` and the keys of that method.
        out: folder for the runs, `report.md` and `contact-sheet.png`; default: `runs/NAME` after the source.
        engine: "local" trains one run after the other in this process, "ray" many at once on a Ray cluster.
        address: Ray cluster, "host:port", or "auto" for the one that runs on this machine; default: a running one,
            else this machine alone.
        progress: see `split`.
        settings: keys of rows that do not set them.

    Raises:
        UserError: rows are faulty; all faults are listed, and nothing was started. Or Ray is not installed.
        MachineError: the Ray cluster does not answer.
        Interrupted: stopped on request after saving.
    """
    trained, path = pick_engine(engine, address), Path(source).expanduser()
    folder = default_folder(path) if out is None else Path(out).expanduser()
    rows = read_rows(path, folder, settings)
    with _view(progress) as report:
        return run_batch(rows, folder, trained, report)


def work(folder: Location = "runs", *, until_empty: bool = True, progress: bool | Callback = True) -> Work:
    """Do the jobs of a `Queue` one after the other, while the base stays loaded.

    Args:
        folder: the runs folder with the queue.
        until_empty: return when no job is left; otherwise wait for more until the process is asked to stop.
        progress: see `split`.
    """
    with _view(progress) as report:
        return work_on(Queue(folder), Trainer(), report, until_empty)


def load_base(source: Location, precision: Precision = "auto", device: str = "auto") -> Base:
    """Open a base in the number format and on the device that the commands choose; its `pipe` is diffusers' pipeline.

    Args:
        source: 'bundled', a diffusers folder, a hub id or a .safetensors checkpoint.
        precision: auto, fp32, fp16 or bf16.
        device: auto, cpu, cuda or mps.

    Raises:
        UserError: nothing is there, it is not of SDXL's topology, or there is no such device or number format.
        MachineError: the hub cannot be reached, or memory does not suffice.
    """
    return bases.open_base(os.fspath(source), precision, device)


def _train(
    model: type[TrainingConfig],
    images: ImageSource | Sequence[ImageSource],
    settings: Mapping[str, Any],
    out: Location | None,
    base: Location | Base | None,
    pipe: StableDiffusionXLPipeline | None,
    resume: bool,
    extend: int,
    progress: bool | Callback,
    name: str = "",
) -> Run:
    """Resolve the configuration of a training, new, resumed or extended, and run it."""
    sources = _images(images)
    if (resume or extend) and out is None:
        raise UserError(f"{'extend' if extend else 'resume'} needs the run folder: give out=")
    folder = (
        Path(out).expanduser()
        if out is not None
        else _default_folder(sources, name or str(settings.get("content") or ""))
    )
    keys = {**_set(settings), "out": folder}
    saved = RunFolder(folder).settings(model) if resume else {}
    if extend:
        saved = RunFolder(folder).settings_to_extend(model, extend)
    if not resume and not extend:
        refuse_waiting(folder)
    in_memory = {number: image for number, image in enumerate(sources, 1) if isinstance(image, Image.Image)}
    with RunFolder(folder).stored(in_memory, resume or bool(extend)) as files:
        if sources:
            keys["images"] = [files.get(number, image) for number, image in enumerate(sources, 1)]
        with _prepared(model, saved, keys, base, pipe, progress) as (config, loaded, view):
            return Run(function_of(config)(config, resume=resume or bool(extend), progress=view, base=loaded).path)


def _images(images: object) -> list[Any]:
    """Return a list of one or several paths and PIL images.

    Raises:
        UserError: there is something else.
    """
    several = isinstance(images, Iterable) and not isinstance(images, (str, os.PathLike, Image.Image))
    sources = list(images) if several and not hasattr(images, "shape") else [images]  # type: ignore[call-overload]
    for source in sources:
        if not isinstance(source, (str, os.PathLike, Image.Image)):
            raise UserError(
                f"images: {type(source).__name__} is neither a path nor a PIL image; Image.fromarray(array) makes one"
            )
    return sources


def _default_folder(images: Sequence[ImageSource], name: str) -> Path:
    """Choose a new folder in `runs`, named after the first image file, else after the words."""
    files = [file_stem(Path(image)) for image in images if not isinstance(image, Image.Image)]
    return free_folder(Path("runs") / safe_name(files[0] if files else name, "image"))


def _lora_path(source: LoraSource | None) -> Path | None:
    return source.path if isinstance(source, RunFolder) else None if source is None else Path(source)


def _set(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys that have a value."""
    return {name: value for name, value in keys.items() if value is not None}


def _sample_keys(
    run: LoraSource | None,
    content: LoraSource | None,
    style: LoraSource | None,
    prompts: str | Sequence[str],
    out: Location | None,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Collect the keys of a sample configuration from its arguments."""
    path = _lora_path(run)
    texts = [prompts] if isinstance(prompts, str) and prompts else list(prompts)
    named = {"content": _lora_path(content), "style": _lora_path(style), "prompts": texts or None, "out": out}
    return {**(loras_of(path) if path else {}), **_set(named), **settings}


@contextmanager
def _prepared(
    model: type[C],
    saved: dict[str, Any],
    keys: dict[str, Any],
    base: Location | Base | None,
    pipe: StableDiffusionXLPipeline | None,
    progress: bool | Callback,
) -> Iterator[tuple[C, Base | None, Callback]]:
    """Yield the resolved configuration, the loaded base if there is one, and the function that shows progress."""
    if base is not None and pipe is not None:
        raise UserError("base and pipe are two ways to say the same: give one of them")
    opened = borrowed(pipe) if pipe is not None else nullcontext(base)
    with opened as source, _view(progress) as report:
        named = {} if source is None else {"base": _base_name(source)}
        yield resolve(model, saved, named, keys), source if isinstance(source, Base) else None, report


def _base_name(base: Location | Base) -> str:
    """Return what finds a base again: its name if it is bundled or on the hub, else its path."""
    if not isinstance(base, Base):
        return str(base)
    named = base.name == "bundled" or HUB_ID.fullmatch(base.name)
    return base.name if named else str(base.pipe.name_or_path or base.name)


def _view(progress: bool | Callback) -> AbstractContextManager[Callback]:
    """Return the context of the caller's own function, or of a view that fits where the output goes."""
    return nullcontext(progress) if callable(progress) else show(quiet=not progress)
