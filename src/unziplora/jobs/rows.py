"""Rows of a batch: images, their words and any other keys, from a folder or from a TOML, CSV or JSON-lines file."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any, get_origin

from pydantic.fields import FieldInfo

from unziplora.config.recipe import refuse_unknown, resolve, with_paths_from
from unziplora.config.split import SplitConfig
from unziplora.config.training import TrainingConfig
from unziplora.errors import MachineError, UserError
from unziplora.jobs.state import state_of
from unziplora.jobs.trainings import TRAININGS, check
from unziplora.runs.folder import RunFolder, changed_settings
from unziplora.utils.files import IMAGE_SUFFIXES, file_stem, image_files, numbered, safe_name
from unziplora.utils.inputs import parse_json, read_text, read_toml, tomllib


@dataclass(frozen=True)
class Row:
    """One training of a batch.

    Attributes:
        place: where it stands, for messages: a line, or the name of an image.
        config: its recipe.
    """

    place: str
    config: TrainingConfig


class _Cell(str):
    """Text of a cell of a table, in which `;` and `|` separate the parts of a list."""


@dataclass(frozen=True)
class _Source:
    """Keys of a row as they were written, and the name of its table in TOML."""

    place: str
    keys: dict[str, Any]
    name: str = ""


def read_rows(source: Path, out: Path, defaults: Mapping[str, Any]) -> list[Row]:
    """Read and check the rows of a batch; those of one base come together.

    Args:
        out: folder of the run folders.
        defaults: keys of rows that do not set them; keys that a row's method does not have are left out.

    Raises:
        UserError: no method has one of the default keys; rows are faulty, all faults are listed with their lines.
    """
    refuse_unknown(defaults, {"method"}.union(*(kind.recipe.model_fields for kind in TRAININGS.values())))
    folder = source if source.is_dir() else source.parent
    rows: list[Row] = []
    faults: dict[str, list[str]] = {}
    runs: dict[str, str] = {}
    recipes: dict[str, str] = {}
    for entry in _read(source):
        try:
            row = _row(entry, folder, out, defaults, runs)
            _check_repeated(row, recipes)
            rows.append(row if _is_finished(row.config) else replace(row, config=check(row.config)))
        except UserError as error:
            for line in str(error).splitlines():
                faults.setdefault(line, []).append(entry.place)
    if faults:
        lines = [f"{_places(places)}: {fault}" for fault, places in faults.items()]
        raise UserError("\n  ".join([f"{source}: nothing was started, because there are faults", *lines]))
    if not rows:
        raise UserError(f"{source}: nothing to do; it names no image")
    bases = [row.config.base for row in rows]
    return sorted(rows, key=lambda row: bases.index(row.config.base))


def _places(places: list[str]) -> str:
    return ", ".join(places[:3]) + (f" and {len(places) - 3} more" if len(places) > 3 else "")


def _read(source: Path) -> list[_Source]:
    try:
        if source.is_dir():
            return [_Source(path.name, {"images": [path.name]}) for path in image_files(source)]
        if not source.exists():
            raise UserError(f"{source}: no such file or folder")
        suffix = source.suffix.lower()
        if suffix == ".toml":
            return list(_read_toml(source))
        if suffix in (".jsonl", ".ndjson"):
            return list(_read_json(source))
        if suffix in (".csv", ".tsv"):
            return list(_read_csv(source))
    except OSError as error:
        raise MachineError(f"{source}: cannot be read ({error.strerror or error})") from None
    except (ValueError, csv.Error) as error:
        raise UserError(f"{source}: cannot be read ({error})") from None
    raise UserError(f"{source}: a batch is a folder of images, or a .toml, .csv or .jsonl file")


def _read_toml(source: Path) -> Iterator[_Source]:
    """Yield a row for each table; keys above the tables are those of all rows."""
    data = read_toml(source)
    lines: dict[str, list[int]] = {}
    for number, line in enumerate(read_text(source).splitlines(), 1):
        if re.match(r"\s*\[.*\]\s*(#.*)?$", line):
            for name in _table_name(line):
                lines.setdefault(name, []).append(number)
    shared = {name: value for name, value in data.items() if not _tables(value)}
    for name, value in data.items():
        for number, table in enumerate(_tables(value)):
            numbers = lines.get(name, [])
            place = f"line {numbers[number]}" if number < len(numbers) else f"table {name}"
            yield _Source(place, {**shared, **table}, name if isinstance(value, dict) else "")


def _table_name(line: str) -> list[str]:
    try:
        return list(tomllib.loads(line))
    except tomllib.TOMLDecodeError:  # a line of a list that looks like the head of a table
        return []


def _tables(value: object) -> list[dict[str, Any]]:
    tables = value if isinstance(value, list) else [value]
    return [table for table in tables if isinstance(table, dict)]


def _read_json(source: Path) -> Iterator[_Source]:
    for number, line in enumerate(read_text(source).splitlines(), 1):
        if line.strip():
            try:
                keys = parse_json(line)
            except ValueError as error:
                keys = {"": f"not valid JSON ({error})"}
            yield _Source(f"line {number}", keys if isinstance(keys, dict) else {"": "not an object in braces"})


def _read_csv(source: Path) -> Iterator[_Source]:
    """Yield a row for each line below the names of the keys; empty cells are not set."""
    text = read_text(source)
    head = text.partition("\n")[0]
    reader = csv.DictReader(StringIO(text, newline=""), delimiter=max(",;\t", key=head.count), strict=True)
    for cells in reader:
        keys: dict[str, Any] = {name: _Cell(cell) for name, cell in cells.items() if name is not None and cell}
        if None in cells:
            keys[""] = "more cells than names in the first line"
        if keys:
            yield _Source(f"line {reader.line_num}", keys)


def _row(entry: _Source, folder: Path, out: Path, defaults: Mapping[str, Any], runs: dict[str, str]) -> Row:
    """Resolve the recipe of a row; `runs` contains the run folders of the rows before it."""
    keys = dict(entry.keys)
    if "" in keys:
        raise UserError(str(keys[""]))
    method = str(keys.pop("method", defaults.get("method", "split")))
    if method not in TRAININGS:
        raise UserError(f"method {method!r}: choose one of {', '.join(TRAININGS)}")
    recipe = TRAININGS[method].recipe
    if "image" in keys:
        keys["images"] = keys.pop("image")
    if entry.name and "images" in recipe.model_fields:
        keys.setdefault("images", _named_images(entry.name, folder))
    name = str(keys.pop("name", ""))
    lists = {key: _listed(value, recipe.model_fields.get(key)) for key, value in keys.items()}
    values = with_paths_from(folder, lists, recipe)
    explicit = bool(name or "out" in values)
    folder_name = safe_name(file_stem(Path(name or _first_name(values) or entry.name)), "image")
    values.setdefault("out", out / folder_name)
    if not explicit:
        values["out"] = next(one for one in numbered(values["out"]) if str(one).casefold() not in runs)
    other = runs.setdefault(str(values["out"]).casefold(), entry.place)
    shared = {key: value for key, value in defaults.items() if key in recipe.model_fields}
    config = resolve(recipe, shared, values)
    if other != entry.place:
        raise UserError(f"the run folder {values['out']} is that of {other} too; give one of them another name")
    return Row(entry.place, config)


def _named_images(name: str, folder: Path) -> list[str]:
    """Return the image that a table is named after, with or without its suffix."""
    names = [name, *(f"{name}{suffix}" for suffix in IMAGE_SUFFIXES)]
    return [next((one for one in names if (folder / one).is_file()), name)]


def _listed(value: Any, field: FieldInfo | None) -> Any:
    """Return a list of a single value, or of the parts of a cell, if the key is a list."""
    if field is None or get_origin(field.annotation) not in (list, tuple) or isinstance(value, list):
        return value
    return [part.strip() for part in re.split(r"[;|]", value)] if isinstance(value, _Cell) else [value]


def _first_name(values: Mapping[str, Any]) -> str:
    """Return the name of the first image, or those of the LoRAs that are to be merged."""
    paths = [*values.get("images", [])[:1], *(values[key] for key in ("content_lora", "style_lora") if key in values)]
    return "-".join(file_stem(Path(str(path))) for path in paths)


def _is_finished(config: TrainingConfig) -> bool:
    """Return True if a run is finished; refuse a folder that contains something else, or a run with other settings."""
    run = RunFolder(config.out)
    if run.is_free():
        return False
    finished = state_of(run) == "finished"
    if not run.unfinished and not finished:
        run.check_free()
    changes = set(changed_settings(_as_begun(run, config), config)) & config.model_fields_set
    if changes:
        names = ", ".join(sorted(changes))
        raise UserError(f"{config.out} contains a run with other settings ({names}); give this row another name")
    return finished


def _as_begun(run: RunFolder, config: TrainingConfig) -> TrainingConfig:
    """Read the recipe of a run as it was when it began, to compare that of a row with it.

    A finished run of several seeds has the settings of the best one, and a run that was trained on has more steps.
    """
    saved = run.config(type(config))
    changes: dict[str, Any] = {}
    if isinstance(saved, SplitConfig) and (others := run.other_seeds) and run.card.exists():
        changes = {"seed": min(saved.seed, *others), "seeds": 1 + len(others)}
    if run.card.exists() and saved.steps > config.steps:
        changes["steps"] = config.steps
    return saved.model_copy(update=changes)


def _check_repeated(row: Row, recipes: dict[str, str]) -> None:
    """Refuse a row that asks for the same training as one before it."""
    settings = type(row.config).__name__ + row.config.model_dump_json(exclude={"out"})
    other = recipes.setdefault(settings, row.place)
    if other != row.place:
        raise UserError(f"the same image with the same settings as {other}; remove one of them")
