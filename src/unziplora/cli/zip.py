"""`unziplora zip`: a content LoRA and a style LoRA to one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from unziplora.cli.command import Keys, Plan, RecipeCommand
from unziplora.cli.options import ExpandedPath
from unziplora.cli.training import prompt_lines, run_layers, train, warn_if_refused
from unziplora.config.zip import ZipConfig
from unziplora.errors import UserError
from unziplora.jobs.trainings import check
from unziplora.utils.files import file_stem


def _layers(params: Mapping[str, Any], file: Keys, flags: Keys) -> list[Keys]:
    """Combine the run to resume, the TOML file, the flags and the two LoRAs named first."""
    arguments = {"content_lora": params["content"], "style_lora": params["style"]}
    flags = {**{name: path for name, path in arguments.items() if path}, **flags}
    loras = [flags.get(name) or file.get(name) for name in arguments]
    if not all(loras) and not (params["resume"] or params["extend"]):
        raise UserError("two LoRAs are needed: unziplora zip CONTENT STYLE; see unziplora zip --help")
    name = "-".join(_name(Path(str(lora))) for lora in loras) if all(loras) else None
    return run_layers(ZipConfig, "zip", file, flags, name, params["resume"], params["extend"])


def _name(lora: Path) -> str:
    """Return the name of a LoRA's run folder, or of its file."""
    stem = file_stem(lora)
    return lora.parent.name or stem if stem in ("content", "style", "lora") else stem


def _plan(config: ZipConfig, resume: bool) -> Plan:
    """List the prompts; LoRAs and images are opened."""
    warn_if_refused(config, resume)
    config = check(config)
    prompts = config.filled_prompts()
    return Plan(config, {"prompts": prompts}, prompt_lines(prompts))


_NOTES = {
    "content_lora": ["the same as CONTENT"],
    "style_lora": ["the same as STYLE"],
    "content_images": ["repeatable"],
    "style_images": ["repeatable"],
    "base": ["default: the LoRAs' own"],
    "out": ["default: runs/CONTENT-STYLE"],
    "sample_guidance": ["default: as in the LoRAs' runs, else 5"],
    "generated_guidance": ["default: as in the LoRAs' runs, else 5"],
}

zip_command = RecipeCommand(
    "zip",
    ZipConfig,
    train,
    _plan,
    help="""Merge a content LoRA and a style LoRA into one (ZipLoRA).

    CONTENT and STYLE are run folders, or LoRA files from any tool, of any rank. Scales of their input
    columns are trained until the merged LoRA does what each did alone.

    \b
      unziplora zip runs/cat runs/fox --out runs/cat-fox
      unziplora zip cat.safetensors sketch.safetensors --content-prompt "a sks cat" \\
        --style-prompt "an image in pencil sketch style"
      unziplora zip runs/cat runs/fox --method direct --style-strength 0.7

    Prompts, images and the base come from the LoRAs' own runs where these are known.
    """,
    short_help="Merge a content LoRA and a style LoRA into one.",
    dry_run="train nothing",
    arguments=[
        click.Argument(["content"], required=False, type=ExpandedPath(), metavar="CONTENT"),
        click.Argument(["style"], required=False, type=ExpandedPath(), metavar="STYLE"),
    ],
    layers=_layers,
    resumable=True,
    notes=_NOTES,
)
