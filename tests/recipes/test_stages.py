"""Every stage trains, stops, resumes and exports at toy size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from recipes.base import clip as clip_module
from recipes.base.clip import ClipStage
from recipes.base.config import Recipe
from recipes.base.loop import Stage, train
from recipes.base.unet import UnetStage
from recipes.base.vae import VaeStage


class After:
    """A stop that says yes after some steps."""

    def __init__(self, steps: int):
        self.left = steps

    def __bool__(self) -> bool:
        self.left -= 1
        return self.left <= 0


@pytest.fixture(autouse=True)
def few_merges(monkeypatch: pytest.MonkeyPatch) -> None:
    """No download: a handful of merges."""
    pairs = [("a", "p"), ("ap", "p"), ("app", "l"), ("k", "e"), ("ke", "y</w>")]
    monkeypatch.setattr(clip_module, "fetch_merges", lambda cache, count: pairs)


def weights(stage: Stage) -> torch.Tensor:
    return torch.cat([p.detach().float().flatten() for m in stage.modules.values() for p in m.parameters()])


def test_vae_resumed_equals_uninterrupted(recipe: Recipe, tmp_path: Path) -> None:
    straight = VaeStage(recipe)
    assert train(straight, After(1000))
    recipe.output = tmp_path / "again"
    assert not train(VaeStage(recipe), After(3))
    resumed = VaeStage(recipe)
    assert train(resumed, After(1000))
    assert torch.equal(weights(straight), weights(resumed))
    assert (recipe.output / "vae" / "vae" / "config.json").exists()


def test_all_stages_and_sheet(recipe: Recipe) -> None:
    for stage in (VaeStage, ClipStage, UnetStage):
        assert train(stage(recipe), After(1000))
    assert (recipe.output / "unet" / "sheet-000006.png").exists()
    log = (recipe.output / "unet" / "log.jsonl").read_text()
    assert all(np.isfinite(float(part.split(",")[0])) for part in log.split('"loss": ')[1:])
