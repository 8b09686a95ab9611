"""The documentation of all keys, made from the models: `python -m unziplora.cli.reference > docs/configuration.md`."""

from __future__ import annotations

import types
import typing
from pathlib import Path
from typing import Any

import annotated_types
from pydantic.fields import FieldInfo

from unziplora.cli.options import plain
from unziplora.config.bench import BenchConfig
from unziplora.config.blora import BLoraConfig
from unziplora.config.dreambooth import DreamBoothConfig
from unziplora.config.probe import ProbeConfig
from unziplora.config.recipe import Recipe, group_of
from unziplora.config.sample import GenerationConfig, GridConfig, SampleConfig
from unziplora.config.split import SplitConfig
from unziplora.config.training import ImageConfig, TrainingConfig
from unziplora.config.zip import ZipConfig

HEAD = """# Configuration

Every key can be given in a TOML file (`--config FILE.toml`), as a flag (`--learning-rate` for `learning_rate`; a
switch has a `--no-` form; lists are given by repeating the flag, `none` empties them) or in Python. Later ones
win: the preset, the file, the flags. Unknown keys and wrong types are errors. `--dry-run` shows what a command
would do with which values. A run folder's `config.toml` holds every value of its run, and can be used as a file
again.

This page is made from the code by `python -m unziplora.cli.reference > docs/configuration.md`.
"""


def reference() -> str:
    """The whole page, Markdown."""
    trained, pictures = "Keys of all trainings", "Keys of all trainings on images"
    generated = "Keys of `sample` and `grid`"
    return "\n".join(
        [
            HEAD,
            _section(trained, TrainingConfig),
            _section(pictures, ImageConfig, TrainingConfig, trained),
            _section("`unziplora split`", SplitConfig, ImageConfig, pictures),
            _presets(SplitConfig),
            _section("`unziplora train dreambooth`", DreamBoothConfig, ImageConfig, pictures),
            _presets(DreamBoothConfig),
            _section("`unziplora train blora`", BLoraConfig, ImageConfig, pictures),
            _presets(BLoraConfig),
            _section("`unziplora zip`", ZipConfig, TrainingConfig, trained),
            _section(generated, GenerationConfig),
            _section("`unziplora sample`", SampleConfig, GenerationConfig, generated),
            _section("`unziplora grid`", GridConfig, GenerationConfig, generated),
            _section("`unziplora blocks`", ProbeConfig),
            _section("`unziplora bench`", BenchConfig),
        ]
    )


def _section(title: str, model: type[Recipe], below: type[Recipe] | None = None, called: str = "") -> str:
    """Tables of a model's keys by group; keys as in the model `below` are left out, whose section is called so."""
    lines = [f"## {title}", "", str(model.__doc__).strip()]
    if below is not None:
        lines += ["", f"The keys of “{called}”, and:"]
    group = None
    for name, field in model.keys().items():
        if below is not None and _same(field, below.model_fields.get(name)):
            continue
        if group_of(field) != group:
            group = group_of(field)
            lines += ["", f"### {group}", "", "| key | type | default | meaning |", "|---|---|---|---|"]
        row = (f"`{name}`", _type(field), _default(field), str(field.description))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")
    return "\n".join(lines) + "\n"


def _same(field: FieldInfo, other: FieldInfo | None) -> bool:
    return other is not None and (field.default, field.description) == (other.default, other.description)


def _presets(model: type[Recipe]) -> str:
    lines = ["### Presets", "", "What each preset sets; all else is as above, and your own keys win over it.", ""]
    for name, keys in model.presets.items():
        values = ", ".join(f"`{key} = {_toml(value)}`" for key, value in keys.items())
        lines.append(f"- **{name}**: {values or 'the defaults above'}")
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_toml(item) for item in value)}]"
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else plain(value)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.default
    if value is None or value == []:
        return "–"
    return f"`{_toml(str(value) if isinstance(value, Path) else value)}`"


def _type(field: FieldInfo) -> str:
    """A key's type and bounds in words."""
    name = _words(field.annotation)
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    bounds = [
        f"{signs[kind]} {plain(getattr(rule, kind))}"
        for rule in field.metadata
        for kind in signs
        if isinstance(rule, getattr(annotated_types, kind.capitalize())) and hasattr(rule, kind)
    ]
    return f"{name} {', '.join(bounds)}".strip()


def _words(annotation: Any) -> str:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_words(arg) for arg in args if arg is not type(None))
    if origin is typing.Literal:
        return ", ".join(f"`{arg}`" for arg in args)
    if origin is list:
        return f"list of {_words(args[0])}"
    if origin is tuple:
        return f"{len(args)} × {_words(args[0])}"
    names = {bool: "switch", int: "integer", float: "number", str: "text", Path: "path"}
    return names.get(annotation, str(annotation))


if __name__ == "__main__":
    print(reference(), end="")
