"""Command-line flags made from a recipe: every key is a flag, in its group, with its help and default."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from unziplora.config.recipe import Recipe, group_of, read_toml

NONE = "none"
"""What is given to a flag to clear a list, or to leave a value to be chosen at run time."""


@dataclass(frozen=True)
class Shape:
    """How a key is given: one value, on/off, several values, or a fixed number of values."""

    kind: str
    type: click.ParamType
    count: int = 1


class Cleared(click.ParamType):
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
    """A flag that stands for a key of a recipe."""

    def __init__(self, *args: Any, key: str, shape: Shape, group: str, **options: Any) -> None:
        super().__init__(*args, **options)
        self.key, self.shape, self.group = key, shape, group


class RecipeCommand(click.Command):
    """A command whose help lists flags by their groups, with its own flags first."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {"Options": []}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None and not isinstance(param, click.Argument):
                groups.setdefault(getattr(param, "group", "Options"), []).append(record)
        for title, records in groups.items():
            with formatter.section(title):
                formatter.write_dl(records, col_max=36)

    def invoke(self, ctx: click.Context) -> Any:
        """Call the command with its own options; keys are fetched with `given`."""
        keys = {param.name for param in self.params if isinstance(param, KeyOption)}
        own = {name: value for name, value in ctx.params.items() if name not in keys}
        return ctx.invoke(self.callback, **own) if self.callback else None


def shape_of(annotation: Any) -> Shape:
    """How a key of this type is given on the command line."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return shape_of(args[0])
    if origin in (typing.Union, types.UnionType):
        kept = [arg for arg in args if arg is not type(None)]
        inner = shape_of(kept[0]) if len(kept) == 1 else Shape("one", click.STRING)
        return Shape(inner.kind, Cleared(inner.type), inner.count) if len(kept) < len(args) else inner
    if annotation is bool:
        return Shape("switch", click.BOOL)
    if origin is list:
        return Shape("many", Cleared(shape_of(args[0]).type))
    if origin is tuple:
        return Shape("fixed", shape_of(args[0]).type, len(args))
    if origin is typing.Literal:
        return Shape("one", click.Choice([str(arg) for arg in args]))
    plain: dict[Any, click.ParamType] = {int: click.INT, float: click.FLOAT, Path: click.Path()}
    return Shape("one", plain.get(annotation, click.STRING))


def options(model: type[Recipe], notes: Mapping[str, list[str]] | None = None) -> list[click.Parameter]:
    """One flag for each key of a recipe.

    Args:
        notes: what to say of a key instead of its default.
    """
    own = notes or {}
    return [_option(model, name, field, own.get(name)) for name, field in model.keys().items()]


def _option(model: type[Recipe], name: str, field: FieldInfo, own: list[str] | None) -> KeyOption:
    shape = shape_of(field.annotation)
    flag = "--" + name.replace("_", "-")
    details: dict[str, Any] = {"type": shape.type}
    if shape.kind == "switch":
        flag, details = f"{flag}/--no-{flag[2:]}", {"default": None}
    elif shape.kind == "many":
        details["multiple"] = True
    elif shape.kind == "fixed":
        details["nargs"] = shape.count
    notes = own or [*_notes(shape), *defaults(model, name, field)]
    text = f"{field.description}" + (f"  [{'; '.join(notes)}]" if notes else "")
    return KeyOption(
        [flag, name], key=name, shape=shape, group=group_of(field), help=text, show_default=False, **details
    )


def _notes(shape: Shape) -> list[str]:
    return ["repeatable"] if shape.kind == "many" else []


def defaults(model: type[Recipe], name: str, field: FieldInfo) -> list[str]:
    """The default of a key, and what presets make of it, as short notes."""
    if field.is_required():
        return ["required"]
    notes = []
    if field.default is not PydanticUndefined and field.default not in (None, [], {}, ""):
        notes.append(f"default: {plain(field.default)}")
    if "preset" in model.model_fields:
        notes += [f"{preset}: {plain(keys[name])}" for preset, keys in model.presets.items() if name in keys]
    return notes


def plain(value: Any) -> str:
    """A value as it would be typed; of a flag that is repeated, the values with commas between them."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list):
        return ", ".join(plain(item) for item in value)
    if isinstance(value, tuple):
        return " ".join(plain(item) for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def given(ctx: click.Context) -> dict[str, Any]:
    """The keys that were set on the command line, and only those."""
    found: dict[str, Any] = {}
    for param in ctx.command.params:
        if not isinstance(param, KeyOption):
            continue
        if ctx.get_parameter_source(param.name or "") is not ParameterSource.COMMANDLINE:
            continue
        found[param.key] = _value(param, ctx.params[param.name or ""])
    return found


def _value(param: KeyOption, value: Any) -> Any:
    if param.shape.kind == "many":
        return [item for item in value if item != NONE]
    if value == NONE and isinstance(param.shape.type, Cleared):
        return None
    return value


def layers(ctx: click.Context, config: str | None) -> list[dict[str, Any]]:
    """The keys of the TOML file, if one is named, and above them those of the command line."""
    return [read_toml(Path(config)) if config else {}, given(ctx)]


def json_option() -> click.Option:
    return click.Option(["--json", "as_json"], is_flag=True, help="Print the result as one JSON document.")


def quiet_option() -> click.Option:
    return click.Option(["--quiet", "-q"], is_flag=True, help="Show no progress and no warnings.")


def config_option() -> click.Option:
    return click.Option(["--config", "config_file"], metavar="FILE", help="TOML file with settings; flags win over it.")


def dry_run_option(does: str) -> click.Option:
    return click.Option(["--dry-run"], is_flag=True, help=f"Show all settings; {does}.")
