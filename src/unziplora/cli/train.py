"""`unziplora train`: DreamBooth and B-LoRA, the other trainings on images."""

from __future__ import annotations

import click

from unziplora.cli.training import training_command
from unziplora.config.blora import BLoraConfig
from unziplora.config.dreambooth import DreamBoothConfig

DREAMBOOTH = """Train one LoRA on images: of a subject, in a style, or both (DreamBooth).

IMAGE is one image file, or several. Name what they share: the subject with --content, the style
with --style, or both.

\b
  unziplora train dreambooth cat1.jpg cat2.jpg cat3.jpg --content cat --out runs/cat
  unziplora train dreambooth sketch.jpg --style "pencil sketch" --out runs/sketch

--prior 1 preserves the base's idea of the class, with class images that the base generates once; later
runs use them again. The run folder then contains cat-content.safetensors, sketch-style.safetensors or, for
both words, a file that ends in -lora.safetensors, with samples and a README.
"""

BLORA = """Train a content and a style LoRA in one block each (B-LoRA).

IMAGE is one image file, or several of one subject in one style. No words are needed; --content and
--style only name the run.

\b
  unziplora train blora cat.jpg --out runs/cat-blora
  unziplora sample --content runs/cat-blora --prompts "A sks in watercolor painting style"
"""


train_command = click.Group(
    "train",
    help="Train LoRAs by other methods: DreamBooth, B-LoRA.",
    short_help="Train LoRAs by other methods: DreamBooth, B-LoRA.",
    commands=[
        training_command(
            "train dreambooth",
            DreamBoothConfig,
            help=DREAMBOOTH,
            short_help="One LoRA for a subject, a style, or both.",
            notes={"prompts": ["repeatable"]},
        ),
        training_command(
            "train blora",
            BLoraConfig,
            help=BLORA,
            short_help="A content and a style LoRA in one block each.",
        ),
    ],
)
