"""Command-line flags made from recipes: every key is a flag, in its group, with its help and default."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import click
from click.core import ParameterSource
from pydantic.fields import FieldInfo

from unziplora.config.recipe import Recipe, defaults, group_of, has_mark

NONE = "none"
"""Value of a flag that empties a list, or leaves the choice to the run."""


@dataclass(frozen=True)
class FlagType:
    """Form of a key on the command line: one value, a switch, a repeated flag, or a fixed number of values."""

    form: Literal["one", "switch", "repeated", "fixed"]
    type: click.ParamType
    count: int = 1


class ExpandedPath(click.ParamType):
    """A path in which ~ is expanded: no shell does so after an equals sign, as in `--config=~/cat.toml`."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        return Path(value).expanduser()


class OrNone(click.ParamType):
    """Another type, or the word none."""

    def __init__(self, inner: click.ParamType) -> None:
        self.inner = inner
        self.name = inner.name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == NONE:
            return value
        try:
            return self.inner.convert(value, param, ctx)
        except click.BadParameter as error:
            if param is not None and param.multiple and "," in str(value):
                each = " ".join(f"{param.opts[0]} {item.strip()}" for item in str(value).split(","))
                self.fail(f"{error.message} Repeat the flag: {each}", param, ctx)
            raise

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str | None:
        if isinstance(self.inner, click.Choice):
            return "[" + "|".join(str(choice) for choice in self.inner.choices) + "]"
        return None


class KeyOption(click.Option):
    """A flag for one key of a recipe."""

    def __init__(self, *args: Any, flag_type: FlagType, group: str, expert: bool, **options: Any) -> None:
        super().__init__(*args, **{**options, "type": flag_type.type})
        self.flag_type, self.group, self.expert = flag_type, group, expert

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """Return the flag and its help; a switch as `--[no-]name`."""
        record = super().get_help_record(ctx)
        if record is None or self.flag_type.form != "switch":
            return record
        return f"--[no-]{self.opts[0].removeprefix('--')}", record[1]


def flag_type(annotation: Any) -> FlagType:
    """Choose the form and type of a flag from a key's annotation."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return flag_type(args[0])
    if origin in (typing.Union, types.UnionType):
        others = [arg for arg in args if arg is not type(None)]
        inner = flag_type(others[0]) if len(others) == 1 else FlagType("one", click.STRING)
        return FlagType(inner.form, OrNone(inner.type), inner.count) if len(others) < len(args) else inner
    if annotation is bool:
        return FlagType("switch", click.BOOL)
    if origin is list:
        return FlagType("repeated", OrNone(flag_type(args[0]).type))
    if origin is tuple:
        return FlagType("fixed", flag_type(args[0]).type, len(args))
    if origin is typing.Literal:
        return FlagType("one", click.Choice([str(arg) for arg in args]))
    simple: dict[Any, click.ParamType] = {int: click.INT, float: click.FLOAT, Path: ExpandedPath()}
    return FlagType("one", simple.get(annotation, click.STRING))


def key_options(model: type[Recipe], notes: Mapping[str, list[str]] | None = None) -> list[KeyOption]:
    """Make one flag for each key of a recipe.

    Args:
        notes: remarks to show behind a key's help instead of its default.
    """
    own = notes or {}
    return [_option(model, name, field, own.get(name)) for name, field in model.keys().items()]


def _option(model: type[Recipe], name: str, field: FieldInfo, own: list[str] | None) -> KeyOption:
    form = flag_type(field.annotation)
    flag = "--" + name.replace("_", "-")
    details: dict[str, Any] = {}
    if form.form == "switch":
        flag, details = f"{flag}/--no-{flag[2:]}", {"default": None}
    elif form.form == "repeated":
        details["multiple"] = True
    elif form.form == "fixed":
        details["nargs"] = form.count
    notes = own or [*(["repeatable"] if form.form == "repeated" else []), *defaults(model, name, field)]
    text = f"{field.description}" + (f"  [{'; '.join(notes)}]" if notes else "")
    marks: dict[str, Any] = {"group": group_of(field), "expert": has_mark(field, "expert")}
    return KeyOption([flag, name], flag_type=form, help=text, show_default=False, **marks, **details)


def typed_keys(ctx: click.Context) -> dict[str, Any]:
    """Return the keys that were set on the command line, and only those."""
    return {
        param.name: _value(param, ctx.params[param.name])
        for param in ctx.command.params
        if isinstance(param, KeyOption)
        and param.name
        and ctx.get_parameter_source(param.name) is ParameterSource.COMMANDLINE
    }


def _value(param: KeyOption, value: Any) -> Any:
    if param.flag_type.form == "repeated":
        return [item for item in value if item != NONE]
    return None if value == NONE and isinstance(param.flag_type.type, OrNone) else value


json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON document.")
quiet_option = click.option("--quiet", "-q", is_flag=True, help="Show no progress and no warnings.")
runs_option = click.option(
    "--runs",
    "folder",
    type=ExpandedPath(),
    default="runs",
    metavar="FOLDER",
    help="Folder of the runs and of their queue.  [default: runs]",
)
