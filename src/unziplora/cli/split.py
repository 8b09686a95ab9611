"""`unziplora split`: one picture to two LoRA files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from unziplora.cli.training import Training, training_command
from unziplora.config.split import SplitConfig

if TYPE_CHECKING:
    from unziplora.methods.unziplora.method import UnZipLora

HELP = """Split a picture into a content LoRA and a style LoRA.

PICTURE is one picture file, or several of one subject in one style. Name the subject with --content
and the style with --style; everything else has a default.

\b
  unziplora split cat.jpg --content cat --style "pencil sketch" --out runs/cat

The run folder then holds content.safetensors, style.safetensors, sample pictures, and a README with
the trigger words. Ctrl-C saves the run; --resume continues it. --dry-run shows all settings and the
memory they need, and trains nothing.

Settings come from, later ones winning: the preset, the file of --config, the flags.
"""


def _method() -> type[UnZipLora]:
    from unziplora.methods.unziplora.method import UnZipLora

    return UnZipLora


split_command = training_command(
    Training("split", SplitConfig, _method), HELP, "Split a picture into a content LoRA and a style LoRA.", {}
)
