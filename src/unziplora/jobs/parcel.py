"""Run folders as bytes, for nodes that do not share the disk: inputs on the way out, results on the way back."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from unziplora.config.recipe import to_toml
from unziplora.config.training import TrainingConfig
from unziplora.formats.adapter_config import ADAPTER_CONFIG
from unziplora.jobs.state import ERROR
from unziplora.jobs.trainings import config_of
from unziplora.runs.folder import CHECKPOINTS, RunFolder, located
from unziplora.utils.files import atomic_write, files_below

_PATHS = "paths.json"
_LEFT_BEHIND = {"samples", "trackers", "steps"}
"""Parts of a run that its continuation does not read."""


_INPUTS = ".inputs"
"""Folder of the files that the settings name, next to the run, which may have any name that is not hidden."""


def pack_run(run: RunFolder) -> bytes:
    """Pack what a training reads: settings, log and checkpoints of its run, and the files that the settings name.

    The base is not among them: it has to be on each node.

    Raises:
        UserError: the settings are damaged.
    """
    config = config_of(run)
    paths: dict[str, Any] = {"run": run.path.name}
    members = [(Path("run", path), run.path / path) for path in files_below(run.path, _LEFT_BEHIND)]
    for number, (key, source) in enumerate(inputs(config)):
        place = Path(_INPUTS, str(number), source.name)
        inner = files_below(source, {"checkpoints", *_LEFT_BEHIND}) if source.is_dir() else [Path()]
        members += [(place / path, source / path) for path in inner]
        members.append((place.with_name(ADAPTER_CONFIG), source.with_name(ADAPTER_CONFIG)))  # if PEFT wrote the file
        paths.setdefault(key, []).append(place.as_posix())
    return _zip(members, {_PATHS: json.dumps(paths)})


def inputs(config: TrainingConfig) -> Iterator[tuple[str, Path]]:
    """Yield the files and folders that a recipe names, by key, except the base."""
    for key, value in located(config).items():
        if key not in ("out", "base"):
            yield from ((key, Path(path)) for path in (value if isinstance(value, list) else [value]))


def unpack_run(data: bytes, folder: Path) -> RunFolder:
    """Lay out a packed run in an empty folder, with settings that name the files there."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        archive.extractall(folder)
        paths = json.loads(archive.read(_PATHS))
    run = RunFolder((folder / "run").rename(folder / paths.pop("run")))
    run.checkpoints.mkdir(exist_ok=True)
    run.samples.mkdir(exist_ok=True)
    config = config_of(run)
    moved: dict[str, Any] = {"out": run.path}
    for key, places in paths.items():
        kind = type(getattr(config, key))  # a list, a path, or the name of a file
        moved[key] = [folder / place for place in places] if kind is list else kind(folder / places[0])
    atomic_write(run.config_file, to_toml(config.model_copy(update=moved)))
    return run


def pack_results(run: RunFolder, names: Iterable[Path] | None = None) -> bytes:
    """Pack the files of a run, or some of them; its settings stay those of the machine where it began."""
    paths = [*files_below(run.path), Path(ERROR)] if names is None else names
    return _zip((path, run.path / path) for path in paths if path != Path(run.config_file.name))


def unpack_results(data: bytes, run: RunFolder) -> None:
    """Write packed files into a run, the card last. Of several seeds it is the run of the best from then on.

    Raises:
        MachineError: disk full, no permission.
    """
    from unziplora.methods.unziplora.seeds import settle_seed

    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = sorted(archive.namelist(), key=lambda name: Path(name).name == run.card.name)
        for name in names:
            if name == run.card.name:
                settle_seed(run)
            atomic_write(run.path / name, archive.read(name))
    received = {Path(name).parent for name in names if Path(name).parent.name == run.checkpoints.name}
    for path in {run.path, *((run.path / folder).parent for folder in received)}:  # several seeds have one each
        one = RunFolder(path)
        one.drop_checkpoints(keep=1 if one.card.exists() else CHECKPOINTS)


def _zip(members: Iterable[tuple[Path, Path]], texts: dict[str, str] | None = None) -> bytes:
    """Return an archive of the files that exist, by their names in it; uncompressed, because weights hardly shrink."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, path in members:
            if path.is_file():
                archive.write(path, name.as_posix())
        for title, text in (texts or {}).items():
            archive.writestr(title, text)
    return buffer.getvalue()
