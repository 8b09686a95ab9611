"""What all commands that train have in common: settings in layers, a plan, a run, its result."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from unziplora.cli.output import emit, memory_advice, note, stdout_kept
from unziplora.config.recipe import read_toml, resolve, to_toml
from unziplora.config.training import ImageConfig
from unziplora.errors import UserError
from unziplora.utils.progress import show

if TYPE_CHECKING:
    from unziplora.runs.folder import RunFolder
    from unziplora.training.method import Method


@dataclass(frozen=True)
class Training:
    """A command that learns from pictures.

    Attributes:
        command: its words after `unziplora`.
        model: its recipe.
        method: imports the method; called when it is needed, for it brings torch along.
    """

    command: str
    model: type[ImageConfig]
    method: Callable[[], type[Method[Any]]]

    def __call__(
        self,
        ctx: click.Context,
        picture: tuple[str, ...],
        config_file: str | None,
        dry_run: bool,
        resume: bool,
        as_json: bool,
        quiet: bool,
    ) -> None:
        """Carry out the command."""
        given = self._layers(ctx, picture, config_file, resume)
        config = resolve(self.model, *given)
        if dry_run:
            self._plan(config, as_json)
            return
        with stdout_kept(), memory_advice(config), show(quiet) as progress:
            from unziplora.training.runner import run_training

            run = run_training(self.method(), config, resume=resume, progress=progress)
        tell_result(run, as_json)

    def _layers(
        self, ctx: click.Context, pictures: tuple[str, ...], config_file: str | None, resume: bool
    ) -> list[dict[str, Any]]:
        """The keys from the run to resume, the TOML file and the command line, with a run folder named."""
        file, flags = layers(ctx, config_file)
        if pictures:
            flags["images"] = [*pictures, *flags.get("images", [])]
        named = flags.get("images") or file.get("images")
        if not named and not resume:
            command = f"unziplora {self.command}"
            raise UserError(f"say what to learn from: {command} PICTURE …; see {command} --help")
        default = Path(str(named[0])).stem if named and isinstance(named, list) else None
        return run_layers(self.command, file, flags, default, resume)

    def _plan(self, config: ImageConfig, as_json: bool) -> None:
        """Show the resolved settings, the prompts and the memory estimate; pictures and masks are opened."""
        with stdout_kept():
            from unziplora.models.sizes import inspect_base
            from unziplora.training.memory import estimate
            from unziplora.training.preflight import check_run

            method, sizes = self.method(), inspect_base(config.base)
            check_run(method, config, config.resolution or sizes.resolution)
            memory = estimate(config, sizes, method.layers(config, sizes.names))
        prompts = config.filled_prompts()
        result = {
            "config": config.model_dump(mode="json"),
            "prompts": prompts,
            "memory": memory.model_dump(mode="json"),
        }
        lines = "\n".join(f"# {name}: {text}" for name, text in prompts.items())
        emit(result, lambda: f"{to_toml(config)}\n# Prompts\n{lines}\n\n{memory.table('# ')}", as_json)


def training_command(training: Training, help: str, short_help: str, notes: Mapping[str, list[str]]) -> RecipeCommand:
    """The click command of a training, with a flag for each key.

    Args:
        notes: what to say of a key instead of its default.
    """
    known = {"images": ["repeatable", "the same as PICTURE"], "out": ["default: runs/NAME, after the picture"]}
    return RecipeCommand(
        training.command.split()[-1],
        callback=click.pass_context(training),
        help=help,
        short_help=short_help,
        params=[
            click.Argument(["picture"], nargs=-1, type=click.Path()),
            config_option(),
            dry_run_option("estimate the memory; train nothing"),
            click.Option(["--resume"], is_flag=True, help="Continue the interrupted run in the folder of --out."),
            json_option(),
            quiet_option(),
            *options(training.model, notes={**known, **notes}),
        ],
    )


def run_layers(
    command: str, file: dict[str, Any], flags: dict[str, Any], default: str | None, resume: bool
) -> list[dict[str, Any]]:
    """The keys from the run to resume, a TOML file and the command line, with a run folder named.

    Args:
        default: what the run is called in `runs`, if nothing else is said; None if nothing is known.
    """
    name = re.sub(r"[^\w.-]+", "-", default).strip(".-") if default else default
    out = flags.get("out") or file.get("out") or (None if name is None else str(Path("runs") / (name or "picture")))
    if not resume:
        return [file, flags, {"out": out} if out else {}]
    if not out:
        raise UserError(f"--resume needs the run folder: unziplora {command} --resume --out runs/NAME")
    saved = Path(str(out)).expanduser() / "config.toml"
    if not saved.is_file():
        raise UserError(f"{out}: no run to resume here (it has no config.toml); leave --resume out")
    return [read_toml(saved), file, flags, {"out": out}]


def tell_result(run: RunFolder, as_json: bool) -> None:
    """Print the files of a finished run."""
    loras = {name: str(path) for name in ("lora", "content", "style") if (path := run.lora(name)).is_file()}
    samples = sorted(str(path) for path in run.samples.glob("*.png"))
    result = {"run": str(run.path), **loras, "samples": samples, "card": str(run.card)}
    lines = [f"{name:<8} {path}" for name, path in loras.items()] + [f"sample   {path}" for path in samples[-1:]]
    emit(result, "\n".join(lines), as_json)
    if not as_json:
        note(f"How to use it: {run.card}")
