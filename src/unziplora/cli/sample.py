"""`unziplora sample` and `grid`: pictures with the LoRAs of runs or files."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

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
from unziplora.config.recipe import resolve, to_toml
from unziplora.config.sample import GenerationConfig, GridConfig, SampleConfig
from unziplora.runs.folder import loras_of
from unziplora.utils.progress import counted, show


def run_sample(
    ctx: click.Context, run: str | None, config_file: str | None, dry_run: bool, as_json: bool, quiet: bool
) -> None:
    """Carry out `sample`."""
    config = resolve(SampleConfig, *_layers(ctx, run, config_file))
    if dry_run:
        return _plan(config, as_json)
    with stdout_kept(), show(quiet) as view:
        from unziplora.sampling.sample import sample

        paths = sample(config, progress=counted(view))
    emit({"pictures": [str(path) for path in paths]}, "\n".join(str(path) for path in paths), as_json)


def run_grid(
    ctx: click.Context, run: str | None, config_file: str | None, dry_run: bool, as_json: bool, quiet: bool
) -> None:
    """Carry out `grid`."""
    config = resolve(GridConfig, *_layers(ctx, run, config_file))
    if dry_run:
        return _plan(config, as_json)
    with stdout_kept(), show(quiet) as view:
        from unziplora.sampling.grid import grid

        path = grid(config, progress=counted(view))
    emit({"picture": str(path)}, str(path), as_json)


def _layers(ctx: click.Context, run: str | None, config_file: str | None) -> list[dict[str, object]]:
    """The keys of file and flags; a run folder named first gives what it has, content and style most often."""
    file, flags = layers(ctx, config_file)
    found: dict[str, object] = {} if run is None else {**loras_of(Path(run))}
    return [file, found, flags]


def _plan(config: GenerationConfig, as_json: bool) -> None:
    """Show the settings, and what follows from the LoRAs: base, guidance and prompts; no weights of a base are read."""
    with stdout_kept():
        from unziplora.models.device import pick_device
        from unziplora.models.sizes import inspect_base
        from unziplora.sampling.sample import check_out, find_sources, with_headers
        from unziplora.sampling.sources import choose_base, guidance, plan

        check_out(config)
        pick_device(config.device)
        sources = with_headers(config, find_sources(config))
        base, prompts = choose_base(config, sources), plan(config, sources)
        inspect_base(base)
    told = {"base": base, "guidance": guidance(config, sources), "prompts": [asdict(prompt) for prompt in prompts]}
    lines = [f"# base: {base}", f"# guidance: {told['guidance']:g}", *(f"# prompt: {p.full}" for p in prompts)]
    if isinstance(config, GridConfig):
        lines.append("# rows: {}, columns: {}".format(*config.axes()))
    result = {"config": config.model_dump(mode="json"), **told}
    emit(result, lambda: "\n".join([to_toml(config), *lines]), as_json)


_RUN = (
    "RUN is a run folder of `unziplora split`, `train` or `zip`: the same as --content RUN --style RUN; "
    "or one LoRA file."
)

sample_command = RecipeCommand(
    "sample",
    callback=click.pass_context(run_sample),
    help=f"""Make pictures with a content LoRA, a style LoRA, or both.

    {_RUN} LoRA files of other programs will do as well; say what to show with --prompts.

    \b
    The picture anew:           unziplora sample runs/cat
    The cat alone:              unziplora sample --content runs/cat --prompts "a sks cat on a beach"
    The style alone:            unziplora sample --style runs/cat --prompts "a dog in pencil sketch style"
    This cat, another's style:  unziplora sample --content runs/cat --style runs/fox
    """,
    short_help="Make pictures with a content LoRA, a style LoRA, or both.",
    params=[
        click.Argument(["run"], required=False, metavar="[RUN]"),
        config_option(),
        dry_run_option("make nothing"),
        json_option(),
        quiet_option(),
        *options(SampleConfig),
    ],
)

grid_command = RecipeCommand(
    "grid",
    callback=click.pass_context(run_grid),
    help=f"""Make one labeled sheet of pictures: strength by strength, or prompts by seeds.

    {_RUN}

    \b
      unziplora grid runs/cat --out cat.png
      unziplora grid --style runs/cat --prompts "a dog" --prompts "a car" --seeds 0 --seeds 1
    """,
    short_help="Make one labeled sheet of pictures.",
    params=[
        click.Argument(["run"], required=False, metavar="[RUN]"),
        config_option(),
        dry_run_option("make nothing"),
        json_option(),
        quiet_option(),
        *options(GridConfig),
    ],
)
