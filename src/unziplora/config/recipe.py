"""Base class of all recipes: one pydantic model serves TOML files, command-line flags, Python and the docs."""

from __future__ import annotations

import os
import re
import reprlib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_origin

import tomli_w
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticUndefined

from unziplora.config.bases import is_bundled
from unziplora.errors import UserError

KINDS = ("content", "style")
"""Names of the two LoRAs, in the order in which they choose columns."""

Precision = Literal["auto", "bf16", "fp16", "fp32"]

R = TypeVar("R", bound="Recipe")
T = TypeVar("T")

_NO_TEXT = re.compile("[\0\ud800-\udfff]")
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 200

GROUPS = ("Input", "Prompts", "Method", "Training", "Output")
"""Groups of keys in the order of `--help` and of the documentation; other groups follow."""


def key(default: Any, help: str, group: str, *, private: bool = False, may_change: bool = False, **bounds: Any) -> Any:
    """Declare one configuration key with its help text, its group in `--help` and its bounds.

    Args:
        private: machine-specific (a path, for example); omitted from published metadata.
        may_change: may differ when a run is resumed, because it does not affect what is learned.
    """
    marks: dict[str, Any] = {"group": group, "private": private, "may_change": may_change}
    return Field(default, description=help, json_schema_extra=marks, **bounds)


def expert(*args: Any, **marks_and_bounds: Any) -> Any:
    """Declare a key that only `--help-all` shows."""
    declaration = key(*args, **marks_and_bounds)
    declaration.json_schema_extra["expert"] = True
    return declaration


_NAMES_OR_PATHS = ("base", "blocks", "clip", "dino", "csd")
_NAMES = ("bundled", "sdxl", "blora")
"""Values of these keys that are never paths."""


class Recipe(BaseModel):
    """Settings of a command. Unknown keys are errors; values are checked once and never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    presets: ClassVar[dict[str, dict[str, Any]]] = {}
    """Named settings that lie under a user's own, for recipes with a key `preset`."""

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, values: Any) -> Any:
        """Lay the keys of the named preset under the user's own."""
        if not isinstance(values, dict) or "preset" not in cls.model_fields:
            return values
        name, base = values.get("preset", "auto"), values.get("base")
        if name == "auto":
            name = "bundled" if isinstance(base, (str, Path)) and is_bundled(base) else "default"
        return {**(cls.presets.get(name, {}) if isinstance(name, str) else {}), **values}

    @field_validator("*", mode="before")
    @classmethod
    def _check_values(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse numbers too large for libraries, true in their place, and text that is neither a name nor a prompt.

        One text in the place of a list is a list of one.
        """
        annotation = cls.model_fields[str(info.field_name)].annotation
        switch = "bool" in str(annotation)
        for item in _items(value):
            if isinstance(item, bool) and not switch:
                raise ValueError("cannot be true or false")
            if isinstance(item, int) and abs(item) >= 2**63:
                raise ValueError("the number is too large")
            if isinstance(item, (str, Path)) and _NO_TEXT.search(str(item)):
                raise ValueError("the text contains a null or half a character")
        return [value] if isinstance(value, str) and get_origin(annotation) is list else value

    @field_validator("*")
    @classmethod
    def _expand_user(cls, value: Any) -> Any:
        """Expand ~ in paths; no shell does so for a TOML file."""
        try:
            if isinstance(value, list):
                return [item.expanduser() if isinstance(item, Path) else item for item in value]
            return value.expanduser() if isinstance(value, Path) else value
        except RuntimeError:
            raise ValueError("~ is followed by a name that no user of this machine has") from None

    @field_validator("base", check_fields=False)
    @classmethod
    def _name_bundled_base(cls, base: str | None) -> str | None:
        """Call the bundled base by its name, even if it was given by its path."""
        return "bundled" if is_bundled(base) else base

    @classmethod
    def keys(cls) -> dict[str, FieldInfo]:
        """Return the declarations of the keys, ordered by group; required ones first."""

        def place(item: tuple[str, FieldInfo]) -> tuple[int, bool]:
            group = group_of(item[1])
            return GROUPS.index(group) if group in GROUPS else len(GROUPS), not item[1].is_required()

        return dict(sorted(cls.model_fields.items(), key=place))

    @classmethod
    def marked(cls, mark: str) -> set[str]:
        """Return the names of the keys declared with a mark: `private`, `may_change` or `expert`."""
        return {name for name, field in cls.model_fields.items() if has_mark(field, mark)}


def _items(value: Any) -> Collection[Any]:
    """Return the values of a list or a table; any other value is its own only item."""
    if isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, (list, tuple)) else [value]


def distinct(values: list[T]) -> list[T]:
    """Drop repeated values."""
    return list(dict.fromkeys(values))


def natural_seeds(seeds: list[int]) -> list[int]:
    """Validate image seeds and drop repeated ones."""
    if any(not 0 <= seed < 2**63 for seed in seeds):
        raise ValueError("seeds are whole numbers from 0 on")
    return distinct(seeds)


def group_of(field: FieldInfo) -> str:
    """Return the group that a key was declared in."""
    return str(_extra(field).get("group", "Options"))


def has_mark(field: FieldInfo, mark: str) -> bool:
    """Check whether a key was declared with a mark: `private`, `may_change` or `expert`."""
    return bool(_extra(field).get(mark))


def defaults(model: type[Recipe], name: str, field: FieldInfo) -> list[str]:
    """Describe the default of a key, and the values that presets give it, in short notes."""
    if field.is_required():
        return ["required"]
    notes = []
    if field.default is not PydanticUndefined and field.default not in (None, [], {}, ""):
        notes.append(f"default: {format_value(field.default)}")
    if "preset" in model.model_fields:
        notes += [f"{preset}: {format_value(keys[name])}" for preset, keys in model.presets.items() if name in keys]
    return notes


def format_value(value: Any) -> str:
    """Format a value as it is typed; the values of a repeated flag are separated by commas."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list):
        return ", ".join(format_value(item) for item in value)
    if isinstance(value, tuple):
        return " ".join(format_value(item) for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _extra(field: FieldInfo) -> dict[str, Any]:
    return field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}


def resolve(model: type[R], *layers: dict[str, Any]) -> R:
    """Build a recipe from layers of keys; later layers win.

    Raises:
        UserError: a key is unknown, missing, of a wrong type or out of bounds; all faults are listed.
    """
    values = {name: value for layer in layers for name, value in layer.items()}
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise UserError(describe(error, model)) from None


def refuse_unknown(keys: Iterable[str], known: Collection[str]) -> None:
    """Refuse keys that are not known.

    Raises:
        UserError: there are such keys; all are listed.
    """
    if unknown := [_unknown(key, known) for key in keys if key not in known]:
        raise UserError("\n".join(unknown))


def _unknown(key: str, known: Iterable[str]) -> str:
    """Describe an unknown key, and suggest the nearest one."""
    from difflib import get_close_matches

    near = get_close_matches(key, list(known), 1)
    return f"unknown key {key!r}" + (f": did you mean {near[0]!r}?" if near else "")


def describe(error: ValidationError, model: type[Recipe]) -> str:
    """Describe each fault in a line, and suggest the nearest key for an unknown one."""
    lines = []
    for fault in error.errors():
        name = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "extra_forbidden":
            lines.append(_unknown(name, model.model_fields))
        elif fault["type"] == "missing":
            field = model.model_fields.get(name)
            lines.append(
                f"{name} is missing (--{name.replace('_', '-')})" + (f": {field.description}" if field else "")
            )
        else:
            message = _message(fault)
            lines.append(f"{name}: {message} (got {_shown(fault['input'])})" if name else message)
    return "\n".join(lines)


def _message(fault: ErrorDetails) -> str:
    """Describe a fault without pydantic's terms."""
    if fault["type"] in ("list_type", "path_type"):
        return f"must be a {fault['type'].removesuffix('_type')}"
    if fault["type"] in ("too_short", "string_too_short") and fault["ctx"]["min_length"] == 1:
        return "must not be empty"
    return fault["msg"].removeprefix("Value error, ")


def _shown(value: Any) -> str:
    """Return a value as written in Python, shortened if it is long or deep."""
    try:
        return _REPR.repr(value)
    except ValueError:  # Python writes no number of more than 4300 digits
        return "a number of thousands of digits"


def with_paths_from(folder: Path, values: dict[str, Any], model: type[Recipe]) -> dict[str, Any]:
    """Let the relative paths among the values of a recipe's keys begin at a folder."""

    def located(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [located(name, item) for item in value]
        if not isinstance(value, str) or value.startswith("~"):
            return value
        local = folder / value
        named = name in _NAMES_OR_PATHS and value not in _NAMES and os.path.exists(local)
        return str(local) if named or "Path" in str(model.model_fields[name].annotation) else value

    return {name: located(name, value) if name in model.model_fields else value for name, value in values.items()}


def to_toml(config: Recipe) -> str:
    """Format a recipe as TOML, without the keys whose value is None (chosen at run time)."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))
