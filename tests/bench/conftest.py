"""Fixtures of a benchmark small enough for tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes import Fake, draw, make_cases

from unziplora.bench import evaluate
from unziplora.bench.cases import Case
from unziplora.bench.workspace import Workspace
from unziplora.config.bench import BenchConfig
from unziplora.models.base import Base


@pytest.fixture(scope="module")
def quick_images() -> Iterator[None]:
    """Draw a color instead of sampling with LoRAs, in tests of what happens to images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "sample_task", lambda base, task, seeds, *_: draw(base, task.prompts, seeds))
        yield


@pytest.fixture
def cases() -> dict[str, Case]:
    """Return two cases, each the partner of the other."""
    return make_cases()


@pytest.fixture
def config(tmp_path: Path, tiny_folder: Path) -> BenchConfig:
    """Return one seed, one image per prompt, one denoising step without guidance."""
    return BenchConfig(
        out=tmp_path / "out",
        base=str(tiny_folder),
        methods=["base"],
        seeds=[0],
        samples=1,
        sample_steps=1,
        guidance=1.0,
        device="cpu",
        precision="fp32",
    )


@pytest.fixture
def workspace(config: BenchConfig) -> Workspace:
    """Return the folder of a benchmark."""
    return Workspace(config, config.out)


@pytest.fixture
def fake(tiny_base: Base) -> Fake:
    """Return a method that counts its trainings."""
    return Fake(tiny_base.unet)
