"""A base that stays loaded: what keeps it, and what replaces it."""

from __future__ import annotations

import gc
import os
import weakref
from pathlib import Path

import pytest
import torch

from unziplora.models.kept import KeptBase, free_memory

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with a file in a subfolder, as weights are; nothing here opens it."""
    weights = tmp_path / "base" / "unet" / "weights"
    weights.parent.mkdir(parents=True)
    weights.touch()
    return tmp_path / "base"


@pytest.fixture
def kept(fresh_base, monkeypatch: pytest.MonkeyPatch) -> KeptBase:
    monkeypatch.setattr("unziplora.models.base.load_base", lambda *_: fresh_base())
    return KeptBase()


def test_the_same_base_is_loaded_once(kept: KeptBase, folder: Path) -> None:
    loads: list[str] = []
    first = kept.load(str(folder), torch.float32, CPU, before=lambda: loads.append("first"))
    assert kept.load(str(folder), torch.float32, CPU, before=lambda: loads.append("again")) is first
    assert loads == ["first"]


def test_another_precision_name_or_file_replaces_it(kept: KeptBase, folder: Path) -> None:
    bases = [
        kept.load(str(folder), torch.float32, CPU),
        kept.load(str(folder), torch.bfloat16, CPU),
        kept.load("bundled", torch.bfloat16, CPU),
        kept.load(str(folder), torch.bfloat16, CPU),
    ]
    os.utime(folder / "unet" / "weights", ns=(0, 2**62))
    bases.append(kept.load(str(folder), torch.bfloat16, CPU))
    assert len({id(base) for base in bases}) == len(bases)
    assert kept.base is bases[-1]


def test_a_base_may_wait_elsewhere_than_where_it_computes(kept: KeptBase, folder: Path) -> None:
    base = kept.load(str(folder), torch.float32, torch.device("meta"), waiting=True)
    assert base.device == torch.device("meta")
    assert base.unet.device == CPU


def test_a_dropped_base_is_loaded_again(kept: KeptBase, folder: Path) -> None:
    first = kept.load(str(folder), torch.float32, CPU)
    kept.drop()
    kept.drop()
    assert kept.base is None
    assert kept.load(str(folder), torch.float32, CPU) is not first


def test_what_the_frames_of_a_handled_error_hold_is_freed() -> None:
    class Weights:
        pass

    held: list[weakref.ref[Weights]] = []

    def train() -> None:
        weights = Weights()
        weights.itself = weights  # type: ignore[attr-defined]
        held.append(weakref.ref(weights))
        try:
            raise MemoryError("inner")
        except MemoryError:
            raise RuntimeError("outer")  # noqa: B904

    gc.disable()
    try:
        try:
            train()
        except RuntimeError as error:
            kept = error
            free_memory(error)
    finally:
        gc.enable()
    assert str(kept) == "outer"
    assert held[0]() is None
