"""What a run is made of: one pydantic model serves TOML file, CLI flags, Python API and docs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic.fields import FieldInfo

from unziplora.errors import UserError

KINDS = ("content", "style")
"""By name, in the order in which they choose columns."""


if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Precision = Literal["auto", "bf16", "fp16", "fp32"]

R = TypeVar("R", bound="Recipe")

GROUPS = ("Input", "Prompts", "Method", "Training", "Output")
"""The groups of keys in the order of `--help` and of the documentation; others follow."""


def key(
    default: Any, help: str, group: str, *, private: bool = False, may_change: bool = False, **constraints: Any
) -> Any:
    """Declare one configuration key with its help text, its group in `--help` and its bounds.

    Args:
        private: it tells about a person's machine, and nothing about what is learned: kept out of what is shared.
        may_change: it may differ when a run is resumed: it changes nothing of what is learned.
    """
    extra: dict[str, Any] = {"group": group, "private": private, "may_change": may_change}
    return Field(default, description=help, json_schema_extra=extra, **constraints)


class Recipe(BaseModel):
    """Common ground of all recipes: unknown keys are errors, values are checked and never changed later."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    presets: ClassVar[dict[str, dict[str, Any]]] = {}
    """Named settings below a user's own, for recipes with a key `preset`."""

    @field_validator("*")
    @classmethod
    def _expand_user(cls, value: Any) -> Any:
        """Paths that begin with ~, which no shell has seen if they come from a TOML file."""
        if isinstance(value, list):
            return [item.expanduser() if isinstance(item, Path) else item for item in value]
        return value.expanduser() if isinstance(value, Path) else value

    @classmethod
    def make(cls: type[R], **keys: Any) -> R:
        """The recipe from keys, under the preset that they name.

        Raises:
            UserError: a key is unknown, missing, of a wrong type or out of bounds; all faults are listed.
        """
        return resolve(cls, keys)

    @classmethod
    def keys(cls) -> dict[str, FieldInfo]:
        """The keys with their declarations, by groups."""

        def place(item: tuple[str, FieldInfo]) -> int:
            group = group_of(item[1])
            return GROUPS.index(group) if group in GROUPS else len(GROUPS)

        return dict(sorted(cls.model_fields.items(), key=place))

    @classmethod
    def marked(cls, mark: str) -> set[str]:
        """The names of the keys that are declared `private`, or those that `may_change`."""
        return {name for name, field in cls.model_fields.items() if _extra(field).get(mark)}


def natural_seeds(seeds: list[int]) -> list[int]:
    """Check seeds of pictures, each once; a validator."""
    if any(not 0 <= seed < 2**63 for seed in seeds):
        raise ValueError("seeds are whole numbers from 0 on")
    return list(dict.fromkeys(seeds))


def group_of(field: FieldInfo) -> str:
    """The group that a key was declared in."""
    return str(_extra(field).get("group", "Options"))


def _extra(field: FieldInfo) -> dict[str, Any]:
    return field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}


def resolve(model: type[R], *layers: dict[str, Any]) -> R:
    """Merge layers of keys, later ones winning, under the preset they name, and check them.

    Raises:
        UserError: a key is unknown, missing, of a wrong type or out of bounds; all faults are listed.
    """
    given: dict[str, Any] = {}
    for layer in layers:
        given.update(layer)
    values = given
    if "preset" in model.model_fields:
        preset = given.get("preset", "auto")
        if preset == "auto":
            preset = "bundled" if given.get("base") == "bundled" else "default"
        values = {**(model.presets.get(preset, {}) if isinstance(preset, str) else {}), **given}
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise UserError(describe(error, model)) from None


def describe(error: ValidationError, model: type[Recipe]) -> str:
    """One line per fault, with the nearest known key for an unknown one."""
    from difflib import get_close_matches

    lines = []
    for fault in error.errors():
        name = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "extra_forbidden":
            near = get_close_matches(name, model.model_fields, 1)
            lines.append(f"unknown key {name!r}" + (f": did you mean {near[0]!r}?" if near else ""))
        elif fault["type"] == "missing":
            field = model.model_fields.get(name)
            lines.append(
                f"{name} is missing (--{name.replace('_', '-')})" + (f": {field.description}" if field else "")
            )
        else:
            message = fault["msg"].removeprefix("Value error, ")
            lines.append(f"{name}: {message} (got {fault['input']!r})" if name else message)
    return "\n".join(lines)


def read_toml(path: Path) -> dict[str, Any]:
    """Read one TOML file of keys.

    Raises:
        UserError: the file is missing, unreadable or not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))  # as Windows' editor saves it
    except FileNotFoundError:
        raise UserError(f"{path}: no such configuration file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: not valid TOML ({error})") from None


def to_toml(config: Recipe) -> str:
    """The resolved configuration as TOML; keys whose value is None (chosen at run time) are left out."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))
