"""Settings as a command, as TOML and as Python: each reads back as the same recipe."""

import ast
import shlex
from pathlib import Path
from typing import Any

import click
import pytest

from unziplora.cli.split import split_command
from unziplora.config.recipe import resolve
from unziplora.config.split import SplitConfig
from unziplora.studio.spelling import choices, read, spell, write
from unziplora.utils.inputs import tomllib

SETTINGS: dict[str, Any] = {
    "images": [Path("a cat.png"), Path("b.png")],
    "content": "cat",
    "style": 'ink "wash"; $(rm)',
    "base": "bundled",
    "out": "runs/cat",
    "rank": 8,
    "betas": (0.5, 0.9),
    "prompt_separation": False,
    "gradient_checkpointing": True,
    "sample_seeds": [3, 4],
    "phrase_words": [],
}


def test_command_reads_back_as_the_same_recipe() -> None:
    program, command, *words = shlex.split(spell("split", SETTINGS, "Command"))
    assert (program, command) == ("unziplora", "split")
    with split_command.make_context("split", words, parent=click.Context(split_command)) as ctx:
        assert split_command.recipe(ctx) == resolve(SplitConfig, SETTINGS)


def test_command_of_a_form_takes_all_values_of_a_tuple_at_once() -> None:
    assert spell("split", {"betas": ["0.5", "0.9"], "style": "red ink"}, "Command").endswith(
        '--betas 0.5 0.9 --style "red ink"'
    )


def test_toml_reads_back_as_the_same_recipe() -> None:
    assert resolve(SplitConfig, tomllib.loads(spell("split", SETTINGS, "TOML"))) == resolve(SplitConfig, SETTINGS)


def test_python_is_a_call_with_the_same_arguments() -> None:
    call = ast.parse(spell("split", SETTINGS, "Python")).body[1].value
    assert ast.unparse(call.func) == "unziplora.split"
    keys = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    assert resolve(SplitConfig, {"images": ast.literal_eval(call.args[0]), **keys}) == resolve(SplitConfig, SETTINGS)


def test_command_of_a_merge_names_its_loras_first() -> None:
    settings = {"content_lora": Path("runs/cat"), "style_lora": "ink.safetensors", "out": "runs/both", "alpha": None}
    assert spell("zip", settings, "Command") == "unziplora zip runs/cat ink.safetensors --out runs/both"
    assert "content='runs/cat'" in spell("zip", settings, "Python")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gradient_checkpointing", True),
        ("rank", 8),
        ("sample_seeds", [3, 4]),
        ("betas", (0.5, 0.9)),
        ("fit", "pad"),
        ("phrase_words", []),
        ("style_learning_rate", 1.23456789e-4),
    ],
)
def test_text_of_a_component_reads_back_as_its_value(name: str, value: Any) -> None:
    field = SplitConfig.model_fields[name]
    words = {"images": ["a.png"], "content": "cat", "style": "ink", "out": "x"}
    assert getattr(resolve(SplitConfig, words, {name: read(field, write(value))}), name) == value


def test_choices_are_those_of_the_recipe() -> None:
    fields = SplitConfig.model_fields
    assert choices(fields["fit"].annotation) == ["crop", "bucket", "pad"]
    assert choices(fields["cuda_graphs"].annotation) == ["on", "off"]
    assert choices(fields["rank"].annotation) == []
