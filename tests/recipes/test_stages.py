"""Every stage trains, stops, resumes and exports at toy size."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, StableDiffusionXLPipeline
from toy import After

import recipes
from recipes.base import judges
from recipes.base.config import JudgeSettings, Recipe
from recipes.base.draws import Batch
from recipes.base.evaluate import evaluate
from recipes.base.export import export
from recipes.base.loop import Stage, train
from recipes.base.unet import UnetStage, trained_pipeline
from recipes.base.vae import VaeStage


def weights(stage: Stage) -> torch.Tensor:
    return torch.cat([p.detach().float().flatten() for m in stage.modules.values() for p in m.parameters()])


def test_resumed_vae_equals_uninterrupted(recipe: Recipe, tmp_path: Path) -> None:
    straight = VaeStage(recipe)
    assert train(straight, After(1000))
    recipe.output = tmp_path / "again"
    assert not train(VaeStage(recipe), After(3))
    resumed = VaeStage(recipe)
    assert train(resumed, After(1000))
    assert torch.equal(weights(straight), weights(resumed))
    assert (recipe.output / "vae" / "vae" / "config.json").exists()


@pytest.mark.slow
def test_vae_of_a_base_keeps_its_latents(trained: Recipe, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    export(trained, folder)
    recipe = trained.model_copy(update={"output": tmp_path / "more"})
    stage = VaeStage(recipe, folder)
    crops = stage.pixels[:4]
    assert float(stage.moved(crops).detach()) == 0
    assert train(stage, After(1000))
    held = float(stage.moved(crops).detach())
    free = VaeStage(trained.model_copy(update={"output": tmp_path / "free"}), folder)
    free.moved = lambda crops: torch.zeros(())  # type: ignore[method-assign]
    assert train(free, After(1000))
    del free.moved
    assert 0 < held < float(free.moved(crops).detach())
    assert stage.vae.config.scaling_factor == AutoencoderTiny.from_pretrained(folder / "vae").config.scaling_factor


def test_unet_stage_writes_sheet_and_finite_losses(trained: Recipe) -> None:
    recipe = trained
    assert (recipe.output / "unet" / "sheet-000006.png").exists()
    log = (recipe.output / "unet" / "log.jsonl").read_text()
    losses = [json.loads(line)["loss"] for line in log.splitlines()]
    assert losses
    assert np.isfinite(losses).all()


@pytest.mark.slow
def test_unet_with_muon_resumes_as_if_never_stopped(trained: Recipe, tmp_path: Path) -> None:
    base = tmp_path / "base"
    export(trained, base)
    settings = trained.unet.model_copy(update={"optimizer": "muon"})

    def stage(name: str) -> UnetStage:
        return UnetStage(trained.model_copy(update={"output": tmp_path / name, "unet": settings}), base)

    straight = stage("straight")
    start = weights(straight)
    assert train(straight, After(1000))
    assert not train(stage("again"), After(3))
    resumed = stage("again")
    assert train(resumed, After(1000))
    assert torch.equal(weights(straight), weights(resumed))
    assert not torch.equal(start, weights(resumed))


@pytest.mark.slow
def test_trained_recipe_is_judged_exported_and_loaded(
    trained: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = JudgeSettings(batch=8, steps=3, width=8, test_drawings=["fxemoji"], test_filters=["clay"])
    recipe = trained.model_copy(update={"judges": few})
    monkeypatch.setattr(judges, "FOLDER", tmp_path)
    judges.train_judges(recipe, After(1000))
    concept = judges.Judge.load("toy", "concept", tmp_path)
    assert concept.labels == ["house", "key", "red-apple", "star"]

    pipe, steps = trained_pipeline(recipe)
    assert steps == 6
    scores = evaluate(pipe, recipe, judges_folder=tmp_path, count=4, steps=2)
    assert set(scores) == {"seen pairs", "unseen pairs", "content only", "style only"}
    assert all(0 <= value <= 1 for group in scores.values() for key, value in group.items() if key != "pictures")

    folder = tmp_path / "base"
    size = export(recipe, folder)
    assert 0 < size < 60_000_000
    assert "never trained" in (folder / "README.md").read_text().lower()
    assert not [file for file in folder.rglob("*") if file.suffix in (".bin", ".pt")]
    loaded = StableDiffusionXLPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    images = loaded("a key in neon sign style", num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 32, 32, 3)
    other = recipe.model_copy(update={"output": tmp_path / "next"})
    again = UnetStage(other, init=folder)
    assert torch.allclose(weights(again)[:100], weights(again).half().float()[:100])


def test_conditions_agree_with_the_pipeline(trained: Recipe) -> None:
    pipe, _ = trained_pipeline(trained)
    stage = UnetStage(trained)
    batch = Batch(torch.zeros(2), torch.zeros(2), torch.ones(2), ["a key", ""])
    hidden, added = stage.conditions(batch)
    theirs, empty, pooled, _ = pipe.encode_prompt("a key", device="cpu")
    assert torch.allclose(hidden[0], theirs[0], atol=2e-2)
    assert torch.allclose(added["text_embeds"][0], pooled[0], atol=1e-5)
    assert torch.allclose(stage.text.encode([""])[0][0], empty[0], atol=2e-2)
    ids = pipe._get_add_time_ids((32, 32), (0, 0), (32, 32), torch.float32, text_encoder_projection_dim=32)
    assert added["time_ids"][0].tolist() == ids[0].tolist()


def test_every_module_of_the_recipes_imports() -> None:
    folder = Path(recipes.__file__).parent
    modules = [path.relative_to(folder.parent).with_suffix("") for path in folder.rglob("*.py")]
    assert all(import_module(".".join(path.parts)) for path in modules)
