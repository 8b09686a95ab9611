"""`unziplora sample` and `grid`: images with the LoRAs of runs or files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import click

from unziplora.cli.command import Keys, Output, Plan, RecipeCommand
from unziplora.cli.options import ExpandedPath
from unziplora.config.sample import GenerationConfig, GridConfig, SampleConfig
from unziplora.utils.progress import Callback, counted


def _layers(params: Mapping[str, Any], file: Keys, flags: Keys) -> list[Keys]:
    """Combine the TOML file, the LoRAs of the run named first (most often content and style), and the flags."""
    if params["run"] is None:
        return [file, flags]
    from unziplora.sampling.sources import loras_of

    return [file, {**loras_of(params["run"])}, flags]


def _sample(config: SampleConfig, progress: Callback) -> Output:
    from unziplora.sampling.sample import sample

    paths = [str(path) for path in sample(config, progress=counted(progress))]
    return Output({"pictures": paths}, "\n".join(paths))


def _grid(config: GridConfig, progress: Callback) -> Output:
    from unziplora.sampling.grid import grid

    path = str(grid(config, progress=counted(progress)))
    return Output({"picture": path}, path)


def _plan(config: GenerationConfig) -> Plan:
    """Find what follows from the LoRAs: base, guidance and prompts; no weights of a base are read."""
    from unziplora.models.device import pick_device
    from unziplora.models.sizes import inspect_base
    from unziplora.sampling.sample import check_out
    from unziplora.sampling.session import plan_sampling

    check_out(config)
    pick_device(config.device)
    plan = plan_sampling(config)
    inspect_base(plan.base)
    guidance, prompts = plan.settings.guidance, plan.prompts
    lines = [f"base: {plan.base}", f"guidance: {guidance:g}", *(f"prompt: {prompt.full}" for prompt in prompts)]
    if isinstance(config, GridConfig):
        lines.append("rows: {}, columns: {}".format(*config.axes()))
    data = {"base": plan.base, "guidance": guidance, "prompts": [asdict(prompt) for prompt in prompts]}
    return Plan(config, data, lines)


_RUN = (
    "RUN is a run folder of `unziplora split`, `train` or `zip`: the same as --content RUN --style RUN; "
    "or one LoRA file."
)

sample_command = RecipeCommand(
    "sample",
    SampleConfig,
    _sample,
    _plan,
    help=f"""Generate images with a content LoRA, a style LoRA, or both.

    {_RUN} LoRA files from other tools work too; say what to show with --prompts.

    \b
    The image again:            unziplora sample runs/cat
    The cat alone:              unziplora sample --content runs/cat --prompts "a sks cat on a beach"
    The style alone:            unziplora sample --style runs/cat --prompts "a dog in pencil sketch style"
    This cat, another's style:  unziplora sample --content runs/cat --style runs/fox
    """,
    short_help="Generate images with a content LoRA, a style LoRA, or both.",
    dry_run="generate nothing",
    arguments=[click.Argument(["run"], required=False, type=ExpandedPath(), metavar="[RUN]")],
    layers=_layers,
)

grid_command = RecipeCommand(
    "grid",
    GridConfig,
    _grid,
    _plan,
    help=f"""Generate one labeled sheet of images: strength by strength, or prompts by seeds.

    {_RUN}

    \b
      unziplora grid runs/cat --out cat.png
      unziplora grid --style runs/cat --prompts "a dog" --prompts "a car" --seeds 0 --seeds 1
    """,
    short_help="Generate one labeled sheet of images.",
    dry_run="generate nothing",
    arguments=[click.Argument(["run"], required=False, type=ExpandedPath(), metavar="[RUN]")],
    layers=_layers,
)
