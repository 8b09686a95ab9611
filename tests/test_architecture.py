"""The floor plan: what a module may import, computed from the source, and the names in ARCHITECTURE.md."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from pkgutil import resolve_name

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "unziplora"
PLAN = (ROOT / "ARCHITECTURE.md").read_text("utf-8")

FLOORS = (
    {"cli"},
    {"studio"},
    {"api"},
    {"bench"},
    {"jobs"},
    {"methods"},
    {"training", "probe"},
    {"sampling"},
    {"models"},
    {"formats", "runs"},
    {"lora", "metrics"},
    {"config", "images", "utils"},
    {"errors"},
)
"""From the roof down. A package imports only from floors below its own."""


def modules(root: Path) -> dict[str, ast.Module]:
    """The syntax trees of a package, by dotted name."""
    trees = {}
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root.parent).with_suffix("").parts
        trees[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(file.read_text("utf-8"))
    return trees


def imported(tree: ast.Module, names: set[str]) -> Iterator[str]:
    """The modules among `names` that a module imports, at any depth: in functions and for type checkers too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            candidates = [(alias.name,) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            candidates = [(f"{node.module}.{alias.name}", str(node.module)) for alias in node.names]
        else:
            continue
        for options in candidates:  # `from package import name`: a module of the package, or the package itself
            yield from [name for name in options if name in names][:1]


def import_graph(root: Path) -> dict[str, set[str]]:
    trees = modules(root)
    return {name: set(imported(tree, set(trees))) for name, tree in trees.items()}


def room(name: str) -> str:
    """The package of a module below `unziplora`, or the module itself at the top."""
    return name.split(".")[1] if "." in name else ""


def climbs(graph: dict[str, set[str]]) -> list[str]:
    """The imports that do not lead to a lower floor. The package's own `__init__` and `__main__` stand above all."""
    floors = {package: number for number, packages in enumerate(FLOORS, 1) for package in packages}

    return [
        f"{name} imports {other}"
        for name, others in graph.items()
        for other in sorted(others)
        if room(name) != room(other) and 0 < floors.get(room(name), 0) >= floors.get(room(other), 0)
    ]


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of import circles: those left when modules without imports or importers are removed."""
    left = {name: others - {name} for name, others in graph.items()}
    while True:
        used = set().union(*left.values())
        inner = {name: others & left.keys() for name, others in left.items() if name in used and others & left.keys()}
        if inner == left:
            return sorted(left)
        left = inner


GRAPH = import_graph(PACKAGE)


def test_every_package_has_a_floor() -> None:
    assert {room(name) for name in GRAPH} - {"", "__main__"} <= set().union(*FLOORS)


def test_packages_import_only_from_floors_below() -> None:
    assert climbs(GRAPH) == []


def test_modules_import_each_other_in_no_circle() -> None:
    assert circle(GRAPH) == []


def test_imports_upwards_and_circles_are_noticed(tmp_path: Path) -> None:
    for name, text in {
        "errors.py": "def late():\n    from unziplora.utils import files",
        "utils/files.py": "import unziplora.errors",
        "config/recipe.py": "from unziplora.utils.files import read",
        "models/base.py": "from unziplora.config.recipe import Recipe",
    }.items():
        (tmp_path / "unziplora" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "unziplora" / name).write_text(text)
    graph = import_graph(tmp_path / "unziplora")
    assert sorted(climbs(graph)) == [
        "unziplora.config.recipe imports unziplora.utils.files",
        "unziplora.errors imports unziplora.utils.files",
    ]
    assert circle(graph) == ["unziplora.errors", "unziplora.utils.files"]


def test_top_of_the_package_has_at_most_20_entries() -> None:
    entries = {file.name for file in PACKAGE.iterdir()} - {"__pycache__"}
    assert len(entries) <= 20, entries


def test_package_imports_no_torch() -> None:
    heavy = ("torch", "diffusers", "transformers", "accelerate", "peft")
    code = f"import sys, unziplora; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_drawing_shows_every_package_and_no_import_that_is_not_there() -> None:
    (drawing,) = re.findall(r"```mermaid\n(.*?)```", PLAN, re.DOTALL)
    drawn = {(a, b) for a, others in re.findall(r"^ +(\w+) --> (.+)$", drawing, re.M) for b in others.split(" & ")}
    real = {(room(name), room(other)) for name, others in GRAPH.items() for other in others}
    assert drawn <= real
    assert {name for pair in drawn for name in pair} == {room(name) for name in GRAPH} - {"", "__main__"}


def named(pattern: str) -> list[str]:
    """What stands between backquotes in ARCHITECTURE.md and matches a pattern."""
    text = re.sub(r"```.*?```", "", PLAN, flags=re.DOTALL)
    return sorted({name for name in re.findall(r"`([^`\n]+)`", text) if re.fullmatch(pattern, name)})


@pytest.mark.parametrize("name", named(r"[\w.]+/[\w./-]*|\w+\.(?:py|md|toml)"))
def test_paths_of_the_architecture_exist(name: str) -> None:
    assert (ROOT / name).exists() or (PACKAGE / name).exists()


@pytest.mark.parametrize("name", named(r"[a-z_]+(?:\.\w+)+(?<!\.py)(?<!\.md)(?<!\.toml)(?:\(\))?"))
def test_names_of_the_architecture_exist(name: str) -> None:
    resolve_name(f"unziplora.{name}".removesuffix("()"))
