"""`unziplora split`: one picture to two LoRA files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from unziplora.cli.common import config_option, dry_run_option, json_option, quiet_option
from unziplora.cli.flags import RecipeCommand, layers, options
from unziplora.cli.output import emit, memory_advice, note, stdout_kept
from unziplora.config import read_toml, resolve, to_toml
from unziplora.config_split import SplitConfig
from unziplora.errors import UserError
from unziplora.progress import show

if TYPE_CHECKING:
    from unziplora.run import RunFolder

HELP = """Split a picture into a content LoRA and a style LoRA.

PICTURE is one picture file, or several of one subject in one style. Name the subject with --content
and the style with --style; everything else has a default.

\b
  unziplora split cat.jpg --content cat --style "pencil sketch" --out runs/cat

The run folder then holds content.safetensors, style.safetensors, sample pictures, and a README with
the trigger words. Ctrl-C saves the run; --resume continues it. --dry-run shows all settings and the
memory they need, and trains nothing.

Settings come from, later ones winning: the preset, the file of --config, the flags.
"""


def run_split(
    ctx: click.Context,
    picture: tuple[str, ...],
    config_file: str | None,
    dry_run: bool,
    resume: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Carry out the command."""
    config = resolve(SplitConfig, *_layers(ctx, picture, config_file, resume))
    if dry_run:
        _plan(config, as_json)
        return
    with stdout_kept(), memory_advice(config), show(quiet) as progress:
        from unziplora.split import split

        run = split(config, resume=resume, progress=progress)
    result = _result(run)
    emit(result, lambda: _text(result), as_json)


def _layers(
    ctx: click.Context, pictures: tuple[str, ...], config_file: str | None, resume: bool
) -> list[dict[str, Any]]:
    """The keys from the run to resume, the TOML file and the command line, with a run folder named."""
    file, flags = layers(ctx, config_file)
    if pictures:
        flags["images"] = [*pictures, *flags.get("images", [])]
    out = flags.get("out") or file.get("out") or _default_out(flags.get("images") or file.get("images"))
    if not resume:
        return [file, flags, {"out": out} if out else {}]
    if not out:
        raise UserError("--resume needs the run folder: unziplora split --resume --out runs/NAME")
    saved = Path(out) / "config.toml"
    if not saved.is_file():
        raise UserError(f"{out}: no run to resume here (it has no config.toml); leave --resume out")
    return [read_toml(saved), file, flags, {"out": out}]


def _default_out(images: Any) -> str | None:
    """runs/NAME after the first picture."""
    if not images or not isinstance(images, list):
        return None
    name = re.sub(r"[^\w.-]+", "-", Path(str(images[0])).stem).strip(".-") or "picture"
    return str(Path("runs") / name)


def _plan(config: SplitConfig, as_json: bool) -> None:
    """Show the resolved settings, the prompts and the memory estimate; pictures and masks are opened."""
    with stdout_kept():
        from unziplora.memory import estimate, inspect_base

        sizes = inspect_base(config.base)
        _check_pictures(config, config.resolution or sizes.resolution)
        memory = estimate(config, sizes)
    result = {
        "config": config.model_dump(mode="json"),
        "prompts": config.prompts(),
        "memory": memory.model_dump(mode="json"),
    }
    prompts = "\n".join(f"# {name}: {text}" for name, text in config.prompts().items())
    emit(result, lambda: f"{to_toml(config)}\n# Prompts\n{prompts}\n\n{memory.table('# ')}", as_json)


def _check_pictures(config: SplitConfig, resolution: int) -> None:
    from unziplora.images import load_mask, load_picture

    for path in config.images:
        load_picture(path, resolution)
    for mask, picture in zip(config.masks, config.images, strict=False):
        load_mask(mask, resolution, picture)


def _result(run: RunFolder) -> dict[str, Any]:
    return {
        "run": str(run.path),
        "content": str(run.content),
        "style": str(run.style),
        "samples": sorted(str(path) for path in run.samples.glob("*.png")),
        "card": str(run.card),
    }


def _text(result: dict[str, Any]) -> str:
    samples = result["samples"][-1:]
    lines = [f"content  {result['content']}", f"style    {result['style']}"]
    lines += [f"sample   {path}" for path in samples]
    note(f"How to use them: {result['card']}")
    return "\n".join(lines)


split_command = RecipeCommand(
    "split",
    callback=click.pass_context(run_split),
    help=HELP,
    short_help="Split a picture into a content LoRA and a style LoRA.",
    params=[
        click.Argument(["picture"], nargs=-1, type=click.Path()),
        config_option(),
        dry_run_option("estimate the memory; train nothing"),
        click.Option(["--resume"], is_flag=True, help="Continue the interrupted run in the folder of --out."),
        json_option(),
        quiet_option(),
        *options(
            SplitConfig,
            notes={"images": ["repeatable", "the same as PICTURE"], "out": ["default: runs/NAME, after the picture"]},
        ),
    ],
)
