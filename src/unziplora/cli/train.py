"""`unziplora train`: the other trainings, DreamBooth and B-LoRA."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from unziplora.cli.training import Training, training_command
from unziplora.config.blora import BLoraConfig
from unziplora.config.dreambooth import DreamBoothConfig

if TYPE_CHECKING:
    from unziplora.methods.blora import BLora
    from unziplora.methods.dreambooth import DreamBooth

DREAMBOOTH = """Train one LoRA on pictures: of a subject, in a style, or both (DreamBooth).

PICTURE is one picture file, or several. Name what they share: the subject with --content, the style
with --style, or both.

\b
  unziplora train dreambooth cat1.jpg cat2.jpg cat3.jpg --content cat --out runs/cat
  unziplora train dreambooth sketch.jpg --style "pencil sketch" --out runs/sketch

--prior 1 keeps what the base knows of the class, on class pictures that it makes itself; they are
kept, and used again by later runs. The run folder then holds content.safetensors, style.safetensors
or, for both, lora.safetensors, with samples and a README.
"""

BLORA = """Train a content and a style LoRA in one block each (B-LoRA).

PICTURE is one picture file, or several of one subject in one style. No words are needed; --content and
--style only name the run.

\b
  unziplora train blora cat.jpg --out runs/cat-blora
  unziplora sample --content runs/cat-blora --prompts "A sks in watercolor painting style"
"""


def _dreambooth() -> type[DreamBooth]:
    from unziplora.methods.dreambooth import DreamBooth

    return DreamBooth


def _blora() -> type[BLora]:
    from unziplora.methods.blora import BLora

    return BLora


train_command = click.Group(
    "train",
    help="Train LoRAs by other methods: DreamBooth, B-LoRA.",
    short_help="Train LoRAs by other methods: DreamBooth, B-LoRA.",
    commands=[
        training_command(
            Training("train dreambooth", DreamBoothConfig, _dreambooth),
            DREAMBOOTH,
            "One LoRA for a subject, a style, or both.",
            {"prompts": ["repeatable"]},
        ),
        training_command(
            Training("train blora", BLoraConfig, _blora),
            BLORA,
            "A content and a style LoRA in one block each.",
            {},
        ),
    ],
)
