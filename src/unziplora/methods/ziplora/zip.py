"""Merge a content LoRA and a style LoRA into one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from unziplora.config.recipe import KINDS
from unziplora.config.zip import ZipConfig
from unziplora.formats.header import LAYERS_KEY
from unziplora.lora.weights import Lora
from unziplora.methods.ziplora.inputs import complete, merge, read_loras
from unziplora.methods.ziplora.method import ZipLora
from unziplora.runs.folder import RunFolder
from unziplora.training.runner import in_run_folder, run_job, write_card, write_loras
from unziplora.utils.progress import Callback, Progress

# What the headers of the merged files tell of their base, which is not opened for a plain sum.
OF_THE_BASE = (
    "modelspec.resolution",
    "modelspec.prediction_type",
    "ss_resolution",
    "ss_zero_terminal_snr",
    LAYERS_KEY,
)


def zip_loras(config: ZipConfig, resume: bool = False, progress: Callback | None = None) -> RunFolder:
    """Merge the configured content and style LoRA into `lora.safetensors` in a run folder.

    What the recipe leaves open, the LoRAs' own runs tell: base, prompts, pictures. Method `direct` needs no base.
    Arguments and errors are those of `run_job`.
    """
    config = complete(config)
    if config.method == "zip":
        return run_job(ZipLora, config, resume, progress)
    return _add(config, resume, progress or (lambda _: None))


def _add(config: ZipConfig, resume: bool, progress: Callback) -> RunFolder:
    """The plain sum, in a run folder like that of a training."""
    ZipLora.check(config)

    def wrote(path: Path) -> None:
        progress(Progress(1, 1, message=f"wrote {path}"))

    def work(run: RunFolder) -> None:
        parts = read_loras(config)
        loras = {"lora": merge(parts), **(parts if config.parts else {})}
        about = ZipLora.about(config)
        write_loras(run, config, about, loras, {}, wrote, _of_the_base(parts))
        write_card(run, config, about, loras)

    return in_run_folder(config, resume, work)


def _of_the_base(parts: Mapping[str, Lora]) -> dict[str, str]:
    """What the content's header tells of the base, else the style's; empty where neither does, for nobody knows."""
    headers = [parts[name].metadata for name in KINDS]
    return {key: next((header[key] for header in headers if key in header), "") for key in OF_THE_BASE}
