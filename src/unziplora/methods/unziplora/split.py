"""Split a picture into a content LoRA and a style LoRA."""

from __future__ import annotations

from unziplora.config.split import SplitConfig
from unziplora.methods.unziplora.method import UnZipLora
from unziplora.runs.folder import RunFolder
from unziplora.training.runner import run_job
from unziplora.utils.progress import Callback


def split(config: SplitConfig, resume: bool = False, progress: Callback | None = None) -> RunFolder:
    """Train a content and a style LoRA on the configured picture and write them into a run folder.

    Arguments and errors are those of `run_job`.
    """
    return run_job(UnZipLora, config, resume, progress)
