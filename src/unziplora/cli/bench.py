"""`unziplora bench`: methods measured against the truth."""

from __future__ import annotations

from unziplora.cli.command import Output, Plan, RecipeCommand
from unziplora.config.bench import BenchConfig
from unziplora.utils.progress import Callback


def _run(config: BenchConfig, progress: Callback) -> Output:
    if config.search:
        from unziplora.bench.search import search_settings

        result = search_settings(config, progress)
        return Output(result.model_dump(mode="json"), str(result))
    from unziplora.bench.photos import photo_table
    from unziplora.bench.run import run_benchmark

    report = run_benchmark(config, progress)
    table = photo_table(report) if config.pictures else str(report)
    return Output(report.model_dump(mode="json"), f"{table}\n\nreport   {config.out / 'report.md'}")


def _plan(config: BenchConfig) -> Plan:
    """List the cases."""
    from unziplora.bench.cases import load_cases, select_cases
    from unziplora.bench.contenders import read_settings
    from unziplora.bench.photos import load_photos

    known = load_photos(config.pictures, 64) if config.pictures else load_cases(config.split)
    cases = select_cases(known, config.cases, config.quick)
    read_settings(config.settings)
    lines = [
        f"{case.slug}: a {case.content} in {case.style} style"
        + ("" if case.partner == case.slug else f", mixed with {case.partner}")
        for case in cases
    ]
    seeds = config.training_seeds("unziplora")
    data = {"cases": [case.slug for case in cases], "training_seeds": seeds}
    return Plan(config, data, ["Cases", *lines, "", f"Training seeds: {', '.join(map(str, seeds))}"])


bench_command = RecipeCommand(
    "bench",
    BenchConfig,
    _run,
    _plan,
    help="""Measure methods against the truth: images that show the correct result.

    A case is a drawing under a filter; the same drawing under other filters, and other drawings under this filter,
    are the truth. 0 is the base without LoRA, 1 an oracle that has learned from many images.

    \b
      unziplora bench --quick --methods base --methods unziplora --methods oracle
      unziplora bench --search 8 --out tuned                            # choose settings on the dev cases
      unziplora bench --split test --settings tuned/settings.toml       # the final figures

    Photos have no truth: with --pictures, results are compared with the photos by CLIP-I, DINO and CSD.

    \b
      unziplora bench --pictures photos --base models/sdxl --clip models/clip --dino models/dino --guidance 5

    Writes report.md, report.json and a contact sheet per case. After an interruption, the same command continues.
    """,
    short_help="Measure methods against the truth.",
    dry_run="list the cases; train nothing",
)
