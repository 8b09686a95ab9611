"""Checkpoints: safetensors files with the whole state of a run, the facts that it belongs to, and a digest of both."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from safetensors import SafetensorError, safe_open
from torch import Tensor

from unziplora.config.training import TrainingConfig
from unziplora.errors import MachineError
from unziplora.formats.safetensors import raw_bytes, write_tensors
from unziplora.runs.folder import RunFolder, located
from unziplora.training.method import Method

C = TypeVar("C", bound=TrainingConfig)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory.

    Attributes:
        step: steps done.
        state: plain containers, numbers, strings and tensors.
        facts: what the state belongs to, see `run_facts`.
    """

    step: int
    state: dict[str, Any]
    facts: dict[str, Any]

    def write(self, file: BinaryIO) -> None:
        """Write the checkpoint tensor by tensor into an open file; no copy of the whole is made in memory."""
        tensors: dict[str, Tensor] = {}
        packed = _pack(self.state, "state", tensors)
        record = json.dumps({"step": self.step, "facts": self.facts, "state": packed})
        write_tensors(file, tensors, {"record": record, "digest": _digest(record, tensors)})

    def is_finite(self) -> bool:
        """Return True if all numbers that the method contains are finite."""
        tensors: dict[str, Tensor] = {}
        _pack(self.state.get("method", self.state), "state", tensors)
        return all(bool(tensor.isfinite().all()) for tensor in tensors.values())

    @classmethod
    def read(cls, path: Path) -> Checkpoint | None:
        """Read a checkpoint; None if it is damaged. No file can run code."""
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if metadata.get("digest") != _digest(metadata.get("record", ""), tensors):
                return None
        except (OSError, SafetensorError, RuntimeError, ValueError):
            return None
        record = json.loads(metadata["record"])
        return cls(record["step"], _unpack(record["state"], tensors), record["facts"])


def newest_checkpoint(run: RunFolder) -> Checkpoint | None:
    """Read the newest checkpoint of a run that is not damaged, and warn of those that are; None if there is none.

    Raises:
        MachineError: all are damaged.
    """
    damaged: list[Path] = []
    for step in reversed(run.steps()):
        checkpoint = Checkpoint.read(run.checkpoint_file(step))
        if checkpoint is not None:
            for path in damaged:
                warnings.warn(f"{path} is damaged; going on from the one after step {step}", stacklevel=2)
            return checkpoint
        damaged.append(run.checkpoint_file(step))
    if damaged:
        raise MachineError(
            f"{run.checkpoints}: all checkpoints are damaged, perhaps by the disk. Delete this folder and resume to "
            "train from the first step, or start a new run with another --out"
        )
    return None


def run_facts(kind: type[Method[C]], config: C) -> dict[str, Any]:
    """Return the facts that decide what a run learns: its settings, and digests of the files that it reads.

    The run adds `base`, the fingerprint of the weights by number format, and `generated`, `Setup.digests`.
    """
    settings = config.model_dump(mode="json", exclude=config.marked("may_change") | located(config).keys())
    files = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in kind.inputs(config).items()}
    return {"settings": {"method": kind.command, **settings}, "files": files}


def changes(checkpoint: Checkpoint, facts: Mapping[str, Any]) -> list[str]:
    """List what differs between the facts of a checkpoint and those of a run, as far as both are known.

    A checkpoint after the last step of its run may be continued with more steps. Keys that came or went with another
    version of the package do not count, nor weights in another number format.
    """
    saved = checkpoint.facts
    then, now = saved["settings"], facts["settings"]
    may_change = ["steps"] if checkpoint.step == then["steps"] < now["steps"] else []
    different = [name for name in now if name in then and then[name] != now[name]]
    lines = [f"{name}: {then[name]!r} → {now[name]!r}" for name in different if name not in may_change]
    for part in ("files", "generated"):
        then, now = saved[part], facts.get(part, saved[part])
        lines += [f"{name}: different content" for name in sorted({*then, *now}) if then.get(name) != now.get(name)]
    then, now = saved["base"], facts.get("base", {})
    lines += ["base: different weights" for dtype in now if dtype in then and then[dtype] != now[dtype]]
    return lines


def _pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Return a value as JSON has it, and put its tensors into a dictionary."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().contiguous()
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"items": [[key, _pack(item, f"{name}.{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return [_pack(item, f"{name}.{number}", tensors) for number, item in enumerate(value)]
    return value


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(item, tensors) for item in value]
    if isinstance(value, dict):
        if "tensor" in value:
            return tensors[value["tensor"]]
        return {key: _unpack(item, tensors) for key, item in value["items"]}
    return value


def _digest(record: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(record.encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(raw_bytes(tensors[name]))
    return digest.hexdigest()
