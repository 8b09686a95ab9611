"""Merge a content LoRA and a style LoRA into one."""

from __future__ import annotations

import shutil
from dataclasses import replace

from unziplora.atomic import atomic_write
from unziplora.card import base_name, card, shared_settings
from unziplora.config_zip import ZipConfig
from unziplora.errors import UserError
from unziplora.job import run_job
from unziplora.lora.families import sdxl_sized
from unziplora.lora.files import Lora, write_lora
from unziplora.lora.metadata import LAYERS_KEY, metadata_for
from unziplora.methods.ziplora import ZipLora
from unziplora.progress import Callback, Progress
from unziplora.run import RunFolder
from unziplora.zip_inputs import complete, merge, read_loras

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
    run = RunFolder.resume(config.out, config) if resume else RunFolder.create(config.out, config)
    with run.lock():
        if run.card.exists():
            raise UserError(f"{run.path}: this run is finished; choose another --out for a new one")
        parts = read_loras(config)
        loras = {"lora": merge(parts), **(parts if config.parts else {})}
        for name, lora in loras.items():
            header = _header(config, run, name, parts["content"])
            for layout in config.formats:
                path = run.lora(name, layout)
                write_lora(replace(lora, metadata=header), path, layout, metadata=header, dtype=config.save_precision)
                progress(Progress(1, 1, message=f"wrote {path}"))
        shapes = {path: (up.shape[0], down.shape[1]) for path, (down, up) in loras["lora"].modules.items()}
        atomic_write(run.card, card(run, config, ZipLora.about(config), sdxl_sized(shapes)))
        shutil.rmtree(run.checkpoints, ignore_errors=True)
    return run


def _header(config: ZipConfig, run: RunFolder, name: str, content: Lora) -> dict[str, str]:
    about = ZipLora.about(config)
    file = about.files[name]
    described = metadata_for(
        title=f"{run.path.name}-{name}",
        trigger=file.trigger,
        hint=f'Add to any prompt: "{file.trigger}". {file.hint}'.strip(),
        base=base_name(config),
        method=f"{about.method}, {name} LoRA",
        settings=shared_settings(config),
    )
    return {**described, **{key: content.metadata[key] for key in OF_THE_BASE if key in content.metadata}}
