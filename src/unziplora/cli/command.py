"""Commands made from recipes: settings in layers, `--dry-run`, one result, and a help in two lengths."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click

from unziplora.cli.options import ExpandedPath, KeyOption, json_option, key_options, quiet_option, typed_keys
from unziplora.cli.output import emit, note, stdout_to_stderr
from unziplora.config.recipe import Recipe, resolve, to_toml, with_paths_from
from unziplora.utils.inputs import read_toml
from unziplora.utils.progress import show

Keys = dict[str, Any]


class Output(NamedTuple):
    """Result of a command.

    Attributes:
        data: the result for `--json`.
        text: the result for people, on stdout.
        note: a hint on stderr; not shown with `--json`.
    """

    data: Keys
    text: str
    note: str = ""


class Plan(NamedTuple):
    """Result of a dry run.

    Attributes:
        config: the recipe, completed as far as possible before the run.
        data: consequences of the recipe, for `--json`.
        comments: the same for people, line by line; written as TOML comments, because they follow the recipe as TOML.
    """

    config: Recipe
    data: Keys
    comments: list[str]


_ALL = "unziplora.help_all"


def _show_all(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        ctx.meta[_ALL] = True
        click.echo(ctx.get_help())
        ctx.exit()


_config_option = click.option(
    "--config", "config_file", type=ExpandedPath(), metavar="FILE", help="TOML file with settings; flags override it."
)
_resume_option = click.option("--resume", is_flag=True, help="Continue the interrupted run in the folder of --out.")
_extend_option = click.option(
    "--extend", type=click.IntRange(min=1), metavar="N", help="Train the finished run of --out for N more steps."
)
_help_all_option = click.option(
    "--help-all",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_all,
    help="Show this message with the flags for experts.",
)


def file_and_flags(params: Mapping[str, Any], file: Keys, flags: Keys) -> list[Keys]:
    """Return the layers of a command without positional arguments: flags win over the TOML file."""
    return [file, flags]


class RecipeCommand(click.Command):
    """A command whose flags are the keys of a recipe."""

    def __init__(
        self,
        name: str,
        model: type[Recipe],
        run: Callable[..., Output],
        plan: Callable[..., Plan],
        *,
        help: str,
        short_help: str,
        dry_run: str,
        arguments: Sequence[click.Argument] = (),
        layers: Callable[[Mapping[str, Any], Keys, Keys], list[Keys]] = file_and_flags,
        resumable: bool = False,
        notes: Mapping[str, list[str]] | None = None,
    ) -> None:
        """Declare a command.

        Args:
            run: carries out a recipe; called with it, a progress callback, and `resume` if resumable.
            plan: examines a recipe without carrying it out; called with it, and `resume` if resumable.
            dry_run: effect of `--dry-run`, for its help.
            layers: combines the command's parameters, the keys of the TOML file and those of the flags.
            notes: remarks to show behind a key's help instead of its default.
        """
        super().__init__(name, help=help, short_help=short_help, params=list(arguments))
        self.model, self.run, self.plan, self.layers, self.resumable = model, run, plan, layers, resumable
        _config_option(self)
        click.option("--dry-run", is_flag=True, help=f"Show all settings; {dry_run}.")(self)
        if resumable:
            _resume_option(self)
            _extend_option(self)
        json_option(self)
        quiet_option(self)
        keys = key_options(model, notes)
        self.params += keys
        if any(key.expert for key in keys):
            _help_all_option(self)

    def recipe(self, ctx: click.Context) -> Any:
        """Resolve the recipe that a command line stands for."""
        return resolve(self.model, *self.layers(ctx.params, self.file_keys(ctx), typed_keys(ctx)))

    def file_keys(self, ctx: click.Context) -> Keys:
        """Read the keys of the TOML file."""
        path: Path | None = ctx.params["config_file"]
        return with_paths_from(path.parent, read_toml(path), self.model) if path else {}

    def invoke(self, ctx: click.Context) -> Any:
        """Resolve the recipe, then show its plan or carry it out."""
        params, config = ctx.params, self.recipe(ctx)
        options = {"resume": params["resume"] or bool(params["extend"])} if self.resumable else {}
        if params["dry_run"]:
            with stdout_to_stderr():
                plan = self.plan(config, **options)
            data = {"config": plan.config.model_dump(mode="json"), **plan.data}
            lines = "\n".join(plan.comments).splitlines()  # a prompt may have several
            comments = "\n".join(f"# {line}" if line else "" for line in lines)
            emit(data, f"{to_toml(plan.config)}\n{comments}", params["as_json"])
            return
        with stdout_to_stderr(), show(params["quiet"]) as progress:
            output = self.run(config, progress, **options)
        emit(output.data, output.text, params["as_json"])
        if output.note and not params["as_json"]:
            note(output.note)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the flags by group: the command's own first, those for experts last, or not at all."""
        groups: dict[str, list[tuple[str, str]]] = {"Options": []}
        params = sorted(self.get_params(ctx), key=lambda param: getattr(param, "expert", False))
        for param in params:
            record = param.get_help_record(ctx)
            if record is None or isinstance(param, click.Argument):
                continue
            if not isinstance(param, KeyOption):
                groups["Options"].append(record)
            elif not param.expert:
                groups.setdefault(param.group, []).append(record)
            elif ctx.meta.get(_ALL):
                groups.setdefault(f"Expert: {param.group}", []).append(record)
        for title, records in groups.items():
            with formatter.section(title):
                formatter.write_dl(records, col_max=22)
