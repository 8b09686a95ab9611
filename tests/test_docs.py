"""What README and docs tell a reader to type exists: commands with their flags, modules, make targets, names, links."""

import ast
import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import click
import pytest

from unziplora.cli import cli
from unziplora.config.recipe import resolve
from unziplora.config.split import SplitConfig
from unziplora.errors import UserError
from unziplora.utils.inputs import read_toml

ROOT = Path(__file__).parent.parent
PATTERNS = ("*.md", "docs/*.md", "experiments/*.md", "recipes/**/README.md", "integrations/*/README.md")
PAGES = sorted(page for pattern in PATTERNS for page in ROOT.glob(pattern))
FENCED = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)


def blocks(page: Path, language: str) -> Iterator[str]:
    return (text for kind, text in FENCED.findall(page.read_text()) if kind == language)


def commands() -> list[list[str]]:
    """Every command line of a shell block, and the inline ones that are whole."""
    found = []
    for page in PAGES:
        lines = [line for text in blocks(page, "sh") for line in text.replace("\\\n", " ").splitlines()]
        inline = re.findall(r"`((?:unziplora|python) [^`]+)`", FENCED.sub("", page.read_text()).replace("\n", " "))
        found += [shlex.split(line, comments=True) for line in (*lines, *inline) if "…" not in line]
    unique = dict.fromkeys(tuple(words) for words in found if words)
    return [["4" if word == "N" else word for word in words] for words in unique]  # N stands for a number


COMMANDS = commands()


def of(*start: str) -> list[list[str]]:
    return [words[len(start) :] for words in COMMANDS if words[: len(start)] == list(start)]


def parsed(words: list[str]) -> click.Context:
    """The innermost command's context, made as the command line makes it, without running anything."""
    command, context, rest = cli, None, words
    name = "unziplora"
    while isinstance(command, click.Group):
        context = click.Context(command, parent=context, info_name=name)
        name, command, rest = command.resolve_command(context, list(rest))
    return command.make_context(name, list(rest), parent=context)


@pytest.mark.parametrize("words", of("unziplora"), ids=" ".join)
def test_commands_parse(words: list[str]) -> None:
    if "--help" in words or "--version" in words:
        with pytest.raises(click.exceptions.Exit):
            parsed(words)
    else:
        assert parsed(words).command.name in words


@pytest.mark.parametrize("words", [["split", "--no-such-flag", "1"], ["no-such-command"]], ids=" ".join)
def test_what_does_not_exist_is_refused(words: list[str]) -> None:
    with pytest.raises((click.UsageError, UserError)):
        parsed(words)


def test_modules_and_scripts_exist() -> None:
    modules = {words[0] for words in of("python", "-m") + of(".venv/bin/python", "-m")} - {"venv", "pytest"}
    scripts = {words[0] for words in of("python") if words[0].endswith(".py")}
    assert {"recipes.base.evaluate", "unziplora.cli.reference"} <= modules
    assert "profiling/step.py" in scripts
    places = {name: [ROOT.joinpath(*name.split(".")), ROOT.joinpath("src", *name.split("."))] for name in modules}
    missing = {
        name
        for name, paths in places.items()
        if not any(path.with_suffix(".py").is_file() or (path / "__main__.py").is_file() for path in paths)
    }
    assert missing | {name for name in scripts if not (ROOT / name).is_file()} == set()


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {words[0] for words in of("make")}
    assert {"demo", "test"} <= named <= targets


def python_names(text: str) -> set[tuple[str, str]]:
    """The (module, name) pairs that a Python block imports, or reads as an attribute of a module that it imports."""
    nodes = list(ast.walk(ast.parse(text)))
    modules = {
        alias.asname or alias.name: alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names
    }
    attributes = {
        (modules[node.value.id], node.attr)
        for node in nodes
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules
    }
    imports = {
        (node.module, alias.name)
        for node in nodes
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }
    return attributes | imports


def test_python_names_exist() -> None:
    names = set().union(*(python_names(text) for page in PAGES for text in blocks(page, "python")))
    assert ("unziplora", "split") in names
    assert {pair for pair in names if not hasattr(import_module(pair[0]), pair[1])} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    for target in targets:
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
            # as GitHub makes them: lower case, hyphens for spaces, punctuation left out
            slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, target


def test_the_readmes_settings_file_is_one(tmp_path: Path) -> None:
    (text,) = blocks(ROOT / "README.md", "toml")
    (tmp_path / "cat.toml").write_text(text)
    config = resolve(SplitConfig, read_toml(tmp_path / "cat.toml"), {"out": "runs/cat"})
    assert (config.content, config.rank) == ("cat", 32)
