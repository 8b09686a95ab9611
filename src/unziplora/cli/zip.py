"""`unziplora zip`: a content LoRA and a style LoRA to one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from unziplora.cli.options import (
    RecipeCommand,
    config_option,
    dry_run_option,
    json_option,
    layers,
    options,
    quiet_option,
)
from unziplora.cli.output import emit, memory_advice, stdout_kept
from unziplora.cli.training import run_layers, tell_result
from unziplora.config.recipe import resolve, to_toml
from unziplora.config.zip import ZipConfig
from unziplora.errors import UserError
from unziplora.utils.progress import show


def run_zip(
    ctx: click.Context,
    content: str | None,
    style: str | None,
    config_file: str | None,
    dry_run: bool,
    resume: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Carry out the command."""
    given = _layers(ctx, content, style, config_file, resume)
    config = resolve(ZipConfig, *given)
    if dry_run:
        _plan(config, as_json)
        return
    with stdout_kept(), memory_advice(config), show(quiet) as progress:
        from unziplora.methods.ziplora.method import zip_loras

        run = zip_loras(config, resume=resume, progress=progress)
    tell_result(run, as_json)


def _layers(
    ctx: click.Context, content: str | None, style: str | None, config_file: str | None, resume: bool
) -> list[dict[str, Any]]:
    """The keys from the run to resume, the TOML file and the command line, with a run folder named."""
    file, flags = layers(ctx, config_file)
    named = {"content_lora": content, "style_lora": style}
    flags = {**{name: path for name, path in named.items() if path}, **flags}
    loras = [flags.get(name) or file.get(name) for name in named]
    if not all(loras) and not resume:
        raise UserError("say what to merge: unziplora zip CONTENT STYLE; see unziplora zip --help")
    default = "-".join(_name(Path(str(lora))) for lora in loras) if all(loras) else None
    return run_layers("zip", file, flags, default, resume)


def _name(lora: Path) -> str:
    """What a run folder or a file is called."""
    return lora.parent.name or lora.stem if lora.stem in ("content", "style", "lora") else lora.stem


def _plan(config: ZipConfig, as_json: bool) -> None:
    """Show the resolved settings and the prompts; LoRAs and pictures are opened."""
    with stdout_kept():
        from unziplora.methods.ziplora.inputs import complete
        from unziplora.methods.ziplora.method import ZipLora
        from unziplora.training.preflight import check_run

        config = complete(config)
        if config.method == "zip":
            check_run(ZipLora, config, 64)
        else:
            ZipLora.check(config)
    prompts = config.filled_prompts()
    lines = "\n".join(f"# {name}: {text}" for name, text in prompts.items())
    result = {"config": config.model_dump(mode="json"), "prompts": prompts}
    emit(result, lambda: f"{to_toml(config)}\n# Prompts\n{lines}", as_json)


_KNOWN = {
    "content_lora": ["the same as CONTENT"],
    "style_lora": ["the same as STYLE"],
    "content_images": ["repeatable"],
    "style_images": ["repeatable"],
    "base": ["default: the one that both LoRAs were trained on"],
    "out": ["default: runs/CONTENT-STYLE"],
    "sample_guidance": ["default: as in the LoRAs' runs, else 5"],
    "generated_guidance": ["default: as in the LoRAs' runs, else 5"],
}

zip_command = RecipeCommand(
    "zip",
    callback=click.pass_context(run_zip),
    help="""Merge a content LoRA and a style LoRA into one (ZipLoRA).

    CONTENT and STYLE are run folders, or LoRA files of any program, of any ranks. Scales of their input
    columns are trained until the merged LoRA does what each did alone.

    \b
      unziplora zip runs/cat runs/fox --out runs/cat-fox
      unziplora zip cat.safetensors sketch.safetensors --content-prompt "a sks cat" \\
        --style-prompt "an image in pencil sketch style"
      unziplora zip runs/cat runs/fox --method direct --style-strength 0.7

    Prompts, pictures and the base come from the LoRAs' own runs where they are known. The run folder then
    holds lora.safetensors, samples, and a README. --method direct adds the two as they are, without a base.
    """,
    short_help="Merge a content LoRA and a style LoRA into one.",
    params=[
        click.Argument(["content"], required=False, metavar="CONTENT"),
        click.Argument(["style"], required=False, metavar="STYLE"),
        config_option(),
        dry_run_option("train nothing"),
        click.Option(["--resume"], is_flag=True, help="Continue the interrupted run in the folder of --out."),
        json_option(),
        quiet_option(),
        *options(ZipConfig, notes=_KNOWN),
    ],
)
