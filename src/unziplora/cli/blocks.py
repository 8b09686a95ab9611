"""`unziplora blocks`: which blocks of a base decide content, and which style."""

from __future__ import annotations

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
from unziplora.cli.output import emit, stdout_kept
from unziplora.config.probe import ProbeConfig
from unziplora.config.recipe import resolve, to_toml
from unziplora.utils.progress import counted, show


def run_blocks(ctx: click.Context, config_file: str | None, dry_run: bool, as_json: bool, quiet: bool) -> None:
    """Carry out the command."""
    config = resolve(ProbeConfig, *layers(ctx, config_file))
    if dry_run:
        _plan(config, as_json)
        return
    with stdout_kept(), show(quiet) as view:
        from unziplora.probe.probe import find_blocks
        from unziplora.probe.scores import table

        findings = find_blocks(config, progress=counted(view))
        text = "\n".join([table(findings), "", *(f"{name:<9} {path}" for name, path in findings.files.items())])
    emit(findings, text, as_json)


def _plan(config: ProbeConfig, as_json: bool) -> None:
    """Show the settings and the words of every pair; no weights of the base are read."""
    with stdout_kept():
        from unziplora.models.sizes import inspect_base

        inspect_base(config.base)
    pairs = config.word_pairs()
    lines = [
        f"# {pair.content} ({pair.other_content} instead), {pair.style} ({pair.other_style} instead)" for pair in pairs
    ]
    result = {"config": config.model_dump(mode="json"), "pairs": [pair._asdict() for pair in pairs]}
    emit(result, lambda: "\n".join([to_toml(config), "# Pairs", *lines]), as_json)


blocks_command = RecipeCommand(
    "blocks",
    callback=click.pass_context(run_blocks),
    help="""Find the blocks of a base that decide content and style, for `unziplora split --blocks`.

    One block at a time sees a prompt with another content word, or another style phrase; how far the picture
    follows it is that block's score (B-LoRA's probe). Writes a block map, the figures, a plot and pictures.

    \b
      unziplora blocks --base models/my-xl --out blocks
      unziplora split cat.jpg --content cat --style "pencil sketch" --base models/my-xl --blocks blocks/blocks.toml

    Takes (1 + 2 · (blocks + 2)) · pairs · seeds pictures: 27 · pairs · seeds for SDXL, which has 11 blocks.
    """,
    short_help="Find the blocks of a base that decide content and style.",
    params=[
        config_option(),
        dry_run_option("show the pairs of words; make nothing"),
        json_option(),
        quiet_option(),
        *options(ProbeConfig),
    ],
)
