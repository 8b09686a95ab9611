"""`unziplora split`: one image to two LoRA files."""

from __future__ import annotations

from unziplora.cli.training import training_command
from unziplora.config.split import SplitConfig

HELP = """Split an image into a content LoRA and a style LoRA.

IMAGE is one image file, or several of one subject in one style. Name the subject with --content and
the style with --style; everything else has a default.

\b
  unziplora split cat.jpg --content cat --style "pencil sketch" --out runs/cat

The run folder then contains cat-content.safetensors, cat-style.safetensors, sample images, and a
README with the trigger words. Ctrl-C saves the run; --resume continues it.
"""


split_command = training_command(
    "split",
    SplitConfig,
    help=HELP,
    short_help="Split an image into a content LoRA and a style LoRA.",
)
