"""`unziplora bench`: methods against the truth."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
from unziplora.config.bench import BenchConfig
from unziplora.config.recipe import resolve, to_toml
from unziplora.utils.progress import show

if TYPE_CHECKING:
    from unziplora.bench.cases import Case


def run_bench(ctx: click.Context, config_file: str | None, dry_run: bool, as_json: bool, quiet: bool) -> None:
    """Carry out the command."""
    config = resolve(BenchConfig, *layers(ctx, config_file))
    if dry_run:
        _plan(config, as_json)
        return
    with stdout_kept(), show(quiet) as view:
        if config.search:
            from unziplora.bench.search import search

            found = search(config, view)
            text = str(found)
            result = found.model_dump(mode="json")
        else:
            from unziplora.bench.bench import bench
            from unziplora.bench.published import published_table

            report = bench(config, view)
            shown = published_table(report) if config.pictures else str(report)
            text = f"{shown}\n\nreport   {config.out / 'report.md'}"
            result = report.model_dump(mode="json")
    emit(result, text, as_json)


def _plan(config: BenchConfig, as_json: bool) -> None:
    """Show the settings and the cases."""
    with stdout_kept():
        from unziplora.bench.cases import choose, load_cases
        from unziplora.bench.contenders import read_settings
        from unziplora.bench.published import published_cases

        known = published_cases(config.pictures, 64) if config.pictures else load_cases(config.split)
        cases = choose(known, config.cases, config.quick)
        read_settings(config.settings)
    lines = [f"# {case.slug}: a {case.content} in {case.style} style" + _mixed(case) for case in cases]
    result = {"config": config.model_dump(mode="json"), "cases": [case.slug for case in cases]}
    emit(result, lambda: "\n".join([to_toml(config), "# Cases", *lines]), as_json)


def _mixed(case: Case) -> str:
    return "" if case.partner == case.slug else f", mixed with {case.partner}"


bench_command = RecipeCommand(
    "bench",
    callback=click.pass_context(run_bench),
    help="""Measure methods against the truth: pictures that show what each should have made.

    A case is a drawing under a filter; the same drawing under other filters, and the same filter on other drawings,
    exist too. Every method learns from the one picture; what its LoRAs give alone, together and mixed with another
    case's is compared with the truth. 0 is the base without LoRA, 1 an oracle that has learned from many pictures.

    \b
      unziplora bench --quick --methods base --methods unziplora --methods oracle
      unziplora bench --search 8 --out tuned                            # choose settings on the dev cases
      unziplora bench --split test --settings tuned/settings.toml       # the final figures

    Real pictures have no truth: with --pictures they are compared with what was made of them, by CLIP-I, DINO and CSD.

    \b
      unziplora bench --pictures photos --base models/sdxl --clip models/clip --dino models/dino --guidance 5

    Writes report.md, report.json and a contact sheet per case. Stopped, the same command continues.
    """,
    short_help="Measure methods against the truth.",
    params=[
        config_option(),
        dry_run_option("show the cases; train nothing"),
        json_option(),
        quiet_option(),
        *options(BenchConfig),
    ],
)
