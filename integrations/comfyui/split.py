"""A split from a graph: the arguments of the command, its run folder, and its two files in ComfyUI's loras folder."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unziplora.config.recipe import KINDS, resolve
from unziplora.config.split import SplitConfig
from unziplora.errors import MachineError, UserError
from unziplora.runs.folder import RunFolder, changed_settings
from unziplora.utils.files import atomic_folder, safe_name

FOLDER = "unziplora"
"""Subfolder of ComfyUI's output and loras folders."""


@dataclass(frozen=True)
class Request:
    """A split as a node asks for it; a number that is 0 is left to the preset."""

    images: Sequence[Path]
    name: str
    content: str
    style: str
    base: str
    preset: str
    steps: int = 0
    seed: int = 0
    save_memory: bool = False

    def check(self) -> None:
        """Check the words before anything is written.

        Raises:
            UserError: the name or a word is missing.
        """
        examples = {"name": "cat", "content": "cat", "style": "pencil sketch"}
        for field, example in examples.items():
            if not getattr(self, field).strip():
                raise UserError(f"{field} is empty: write a word or phrase, such as {example!r}")

    def folder(self, output: Path) -> Path:
        """Return the run folder below ComfyUI's output folder."""
        return output / FOLDER / safe_name(self.name, "run", longest=50)

    def settings(self, run: RunFolder) -> dict[str, Any]:
        """Return the keys of the recipe that differ from the preset."""
        keys = {name: getattr(self, name) for name in ("content", "style", "base", "preset", "seed")}
        keys |= {"images": [str(path) for path in self.images], "out": str(run.path)}
        keys |= {"steps": self.steps} if self.steps else {}
        return keys | ({"gradient_checkpointing": True} if self.save_memory else {})

    def arguments(self, run: RunFolder) -> list[str]:
        """Return the arguments of `unziplora`; a run that was stopped goes on."""
        arguments = ["split"]
        for name, value in self.settings(run).items():
            flag = f"--{name.replace('_', '-')}"
            for item in value if isinstance(value, list) else [value]:
                arguments += [flag] if item is True else [flag, str(item)]
        return [*arguments, "--resume"] if run.unfinished else arguments

    def is_done(self, run: RunFolder) -> bool:
        """Return whether the run is finished already, with these settings.

        Raises:
            UserError: it is finished with other settings.
        """
        if not run.card.exists():
            return False
        saved, asked = run.config(SplitConfig), resolve(SplitConfig, self.settings(run))
        changed = {*changed_settings(saved, asked), *(["steps"] if saved.steps != asked.steps else [])}
        if changed:
            raise UserError(
                f"{run.path} is finished, with other settings ({', '.join(sorted(changed))}): write another name"
            )
        return True


def install(run: RunFolder, loras: Path) -> dict[str, str]:
    """Copy the two LoRAs of a finished run into a loras folder; return their names there by kind.

    Raises:
        UserError: another run left files of these names.
        MachineError: disk full, no permission.
    """
    target = loras / FOLDER / run.path.name
    names = {kind: run.lora(kind).name for kind in KINDS}

    def fill(folder: Path) -> None:
        for kind, name in names.items():
            shutil.copyfile(run.lora(kind), folder / name)

    try:
        if not target.exists():
            atomic_folder(target, fill)
        for kind, name in names.items():
            if not (target / name).is_file() or (target / name).stat().st_size != run.lora(kind).stat().st_size:
                raise UserError(f"{target / name} is not this run's: choose another name, or move that folder away")
    except OSError as error:
        raise MachineError(f"{target}: cannot be written ({error.strerror})") from None
    return {kind: str(Path(FOLDER) / run.path.name / name) for kind, name in names.items()}
