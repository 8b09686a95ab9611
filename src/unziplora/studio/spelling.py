"""Keys of recipes as texts in a form, and whole settings as a command line, as TOML or as Python."""

from __future__ import annotations

import os
import re
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal

import tomli_w
from pydantic.fields import FieldInfo

from unziplora.config.recipe import format_value
from unziplora.config.sample import GridConfig, SampleConfig
from unziplora.jobs.trainings import TRAININGS
from unziplora.runs.model_card import argument

COMMANDS = {
    "split": ("split", "split"),
    "dreambooth": ("train dreambooth", "train_dreambooth"),
    "blora": ("train blora", "train_blora"),
    "zip": ("zip", "zip_loras"),
    "sample": ("sample", "sample"),
    "grid": ("grid", "grid"),
}
"""Words on the command line, and the function in Python, by the name of what is done."""

Spelling = Literal["Command", "TOML", "Python"]
SPELLINGS: tuple[Spelling, ...] = ("Command", "TOML", "Python")

_POSITIONAL = {"images": "images", "content_lora": "content", "style_lora": "style"}
"""Keys that commands take without a flag, and their names in Python."""


EMPTY = "none"
"""Text of a list without members, as on the command line."""


def choices(annotation: Any) -> list[str]:
    """Return the values that a key can have, as texts; none if they cannot be listed."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return next((options for arg in args if (options := choices(arg))), [])
    if annotation is bool:
        return ["on", "off"]
    return [str(arg) for arg in args] if origin is typing.Literal else []


def _is_list(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (list, tuple)


def read(field: FieldInfo, text: str) -> Any:
    """Return a component's text as its recipe reads it; the members of a list are separated by semicolons."""
    if choices(field.annotation) == ["on", "off"]:
        return text == "on"
    if not _is_list(field.annotation):
        return text
    return [] if text.strip() == EMPTY else [part for item in re.split(r"[;|]", text) if (part := item.strip())]


def write(value: Any) -> str:
    """Return the text of a component for a value; the reverse of `read`."""
    if isinstance(value, (list, tuple)):
        return "; ".join(map(write, value)) or EMPTY
    return repr(value) if isinstance(value, float) else format_value(value)


def spell(action: str, settings: Mapping[str, Any], spelling: Spelling) -> str:
    """Write settings as a command line, as the TOML file of a command, or as Python.

    Args:
        action: a key of `COMMANDS`.
        settings: the keys that are set, of any kind that a recipe contains.
    """
    known = {name: _typed(action, name, value) for name, value in settings.items() if value is not None}
    writers: dict[Spelling, Callable[[str, dict[str, Any]], str]] = {
        "Command": _as_command,
        "TOML": _as_toml,
        "Python": _as_python,
    }
    return writers[spelling](action, known)


def _typed(action: str, name: str, value: Any) -> Any:
    """Return the list of a form or a file as a tuple if its key is one: such a flag takes all values at once."""
    model = TRAININGS[action].recipe if action in TRAININGS else GridConfig if action == "grid" else SampleConfig
    return tuple(value) if typing.get_origin(model.model_fields[name].annotation) is tuple else value


def _plain(value: Any) -> Any:
    """Return a value as TOML and Python literals have it."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _as_command(action: str, settings: dict[str, Any]) -> str:
    words = ["unziplora", *COMMANDS[action][0].split()]
    for name in _POSITIONAL:
        value = settings.pop(name, [])
        words += [str(item) for item in (value if isinstance(value, list) else [value])]
    for name, value in settings.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, list):
            words += [word for item in value or [EMPTY] for word in (flag, str(item))]
        else:
            words += [flag, *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    return " ".join(map(argument, words))


def _as_toml(action: str, settings: dict[str, Any]) -> str:
    command = COMMANDS[action][0]
    return f"# unziplora {command} --config FILE.toml\n" + tomli_w.dumps({k: _plain(v) for k, v in settings.items()})


def _as_python(action: str, settings: dict[str, Any]) -> str:
    first, named = [], []
    for name, value in settings.items():
        plain = _plain(value)
        if name == "images":
            first.append(repr(plain[0] if len(plain) == 1 else plain))
        else:
            named.append(f"{_POSITIONAL.get(name, name)}={plain!r}")
    lines = "".join(f"    {part},\n" for part in [*first, *named])
    return f"import unziplora\n\nunziplora.{COMMANDS[action][1]}(\n{lines})\n"
