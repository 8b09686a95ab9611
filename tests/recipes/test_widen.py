"""Bases with more latent channels, which start with the results of the original."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from PIL import Image
from toy import After

from recipes.base.config import Recipe
from recipes.base.dataset import training_images
from recipes.base.draws import Deck
from recipes.base.export import export
from recipes.base.loop import train
from recipes.base.roundtrip import roundtrip
from recipes.base.unet import UnetStage, trained_pipeline
from recipes.base.vae import VaeStage, broad_images, to_tensor
from recipes.base.widen import copied_channels, share_inputs, sources_along, widen_first_level, widen_unet, widen_vae
from recipes.base.world import World
from unziplora.bench.cases import load_cases
from unziplora.errors import UserError

MORE = 20


@pytest.fixture(scope="module")
def folder(trained: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported base with 16 latent channels."""
    path = tmp_path_factory.mktemp("base") / "toy"
    export(trained, path)
    return path


@pytest.fixture
def wide(trained: Recipe, tmp_path: Path) -> Recipe:
    """The same recipe with more latent channels."""
    vae = trained.vae.model_copy(update={"latent_channels": MORE})
    return trained.model_copy(update={"output": tmp_path / "wide", "vae": vae})


@pytest.mark.slow
def test_wider_autoencoder_keeps_latents_and_reconstructions(folder: Path) -> None:
    vae = AutoencoderTiny.from_pretrained(folder / "vae", torch_dtype=torch.float32)
    more = widen_vae(vae, MORE)
    image = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        old, new = vae.encode(image).latents, more.encode(image).latents
        assert new.shape[1] == MORE
        assert torch.allclose(new[:, :16], old, atol=1e-5)
        assert new[:, 16:].std() > 0
        assert torch.allclose(more.decode(new).sample, vae.decode(old).sample, atol=1e-5)


def test_wider_unet_keeps_predictions_and_predicts_zero_for_new_channels(folder: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32)
    more = widen_unet(unet, MORE)
    latents, t = torch.randn(2, MORE, 4, 4), torch.tensor([10, 700])
    hidden, added = torch.randn(2, 77, 48), {"text_embeds": torch.randn(2, 32), "time_ids": torch.ones(2, 6)}
    with torch.no_grad():
        old = unet(latents[:, :16], t, hidden, added_cond_kwargs=added).sample
        new = more(latents, t, hidden, added_cond_kwargs=added).sample
    assert torch.allclose(new[:, :16], old, atol=1e-5)
    assert torch.equal(new[:, 16:], torch.zeros_like(new[:, 16:]))


class TestWiderFirstLevel:
    """More channels at the latents' full size."""

    def test_channels_are_copied_within_the_groups_of_norms(self):
        assert copied_channels(8, 12, groups=2).tolist() == [0, 1, 2, 3, 0, 1, 4, 5, 6, 7, 6, 7]

    def test_channels_of_other_levels_come_first_and_stay(self):
        sources = torch.tensor([0, 1, 0])
        assert sources_along(4, 4, 2, sources).tolist() == [0, 1, 2, 3]
        assert sources_along(6, 5, 2, sources).tolist() == [0, 1, 2, 3, 4, 3]
        assert sources_along(6, 4, 2, sources).tolist() == [0, 1, 0, 2, 3, 2]

    def test_readers_of_equal_copies_compute_what_they_did(self):
        weight, index = torch.randn(5, 4, 3, 3), torch.tensor([0, 1, 2, 3, 1, 3])
        wide, images = share_inputs(weight, index, torch.Generator().manual_seed(0)), torch.randn(2, 4, 6, 6)
        before = torch.nn.functional.conv2d(images, weight)
        after = torch.nn.functional.conv2d(images[:, index], wide)
        assert torch.allclose(after, before, atol=1e-5)
        assert not torch.allclose(wide[:, 1], wide[:, 4], atol=1e-3)  # or both would learn the same for ever

    def test_unet_predicts_about_the_same(self, folder: Path):
        unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32)
        wide = widen_first_level(unet, 48)
        assert wide.config.block_out_channels == (48, 32, 32)
        latents, t = torch.randn(2, 16, 4, 4), torch.tensor([10, 700])
        hidden, added = torch.randn(2, 77, 48), {"text_embeds": torch.randn(2, 32), "time_ids": torch.ones(2, 6)}
        with torch.no_grad():
            old = unet(latents, t, hidden, added_cond_kwargs=added).sample
            new = wide(latents, t, hidden, added_cond_kwargs=added).sample
        assert (new - old).square().mean() < 0.05 * old.square().mean()

    def test_level_as_wide_as_the_next_is_refused(self, folder: Path):
        unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32)
        with pytest.raises(UserError, match="cannot have 32 channels"):
            widen_first_level(unet, 32)

    def test_stage_widens_the_base_to_the_recipe(self, folder: Path, trained: Recipe, tmp_path: Path):
        settings = trained.unet.model_copy(update={"channels": [48, 32, 32], "steps": 1})
        recipe = trained.model_copy(update={"output": tmp_path / "next", "unet": settings})
        assert train(UnetStage(recipe, folder), After(1000))
        pipe, _ = trained_pipeline(recipe)
        assert pipe.unet.config.block_out_channels == (48, 32, 32)
        assert pipe("a key", num_inference_steps=2, output_type="np").images.shape == (1, 32, 32, 3)

    @pytest.mark.parametrize(
        "change", [{"channels": [16, 32, 64]}, {"heads": [1, 1, 2]}, {"transformer_layers": [1, 1, 1]}]
    )
    def test_stage_refuses_a_base_with_other_levels(self, folder: Path, trained: Recipe, tmp_path: Path, change: dict):
        settings = trained.unet.model_copy(update=change)
        recipe = trained.model_copy(update={"output": tmp_path / "next", "unet": settings})
        (key,) = change
        with pytest.raises(UserError, match=rf"unet\.{key} is .* in the recipe and .* in .*base"):
            UnetStage(recipe, folder)


@pytest.mark.slow
def test_wider_base_trains_and_exports(folder: Path, wide: Recipe, tmp_path: Path) -> None:
    before = AutoencoderTiny.from_pretrained(folder / "vae", torch_dtype=torch.float32)
    stage = VaeStage(wide, folder)
    images = to_tensor(stage.pixels[:32], stage.device)
    with torch.no_grad():
        fresh = stage.vae.encode(images).latents
        assert torch.allclose(fresh[:, :16], before.encode(images).latents, atol=1e-4)
    assert 0.5 < float(fresh[:, 16:].std()) < 2
    assert train(stage, After(1000))
    assert train(UnetStage(wide, folder), After(1000))
    assert UnetStage(wide, folder).unet.config.in_channels == MORE
    pipe, _ = trained_pipeline(wide)
    assert pipe("a key", num_inference_steps=2, output_type="np").images.shape == (1, 32, 32, 3)
    longer = wide.unet.model_copy(update={"before": 100, "before_batch": 32})
    export(wide.model_copy(update={"unet": longer}), tmp_path / "more")
    card = (tmp_path / "more" / "README.md").read_text()
    assert f"latents of {MORE} channels" in card
    assert "UNet: 3,224 pictures seen" in card


def test_untrained_parts_come_from_the_base(folder: Path, trained: Recipe, tmp_path: Path):
    recipe = trained.model_copy(update={"output": tmp_path / "next"})
    stage = UnetStage(recipe, folder)
    theirs = AutoencoderTiny.from_pretrained(folder / "vae", torch_dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(stage.vae.parameters(), theirs.parameters(), strict=True))
    assert (recipe.output / "clip" / "text_encoder_2").is_dir()


class TestGradedImages:
    """Images on other papers, and prompts that name the paper."""

    def test_prompts_of_graded_images_name_their_paper(self, trained: Recipe):
        images = training_images(trained)
        papers = [f"paper {number}" for number in range(len(images))]
        settings = trained.unet.model_copy(update={"graded": 0.5, "kinds": {"full": 1.0}})
        deck = Deck(images, World(trained.world), settings, papers)
        chosen, prompts = deck.draw(200, np.random.default_rng(0))
        graded = chosen >= len(papers)
        assert 70 < graded.sum() < 130
        for number, prompt in zip(chosen, prompts, strict=True):
            assert prompt.endswith(f" on paper {number - len(papers)}") == (number >= len(papers))

    def test_graded_latents_follow_plain_latents(self, trained: Recipe):
        settings = trained.unet.model_copy(update={"graded": 0.5})
        plain, both = UnetStage(trained), UnetStage(trained.model_copy(update={"unet": settings}))
        count = len(plain.batches.deck.items)
        assert torch.equal(both.latents[:count], plain.latents)
        assert len(both.latents) == 2 * count
        assert not torch.allclose(both.latents[count:], plain.latents, atol=0.05)


class TestBroadImages:
    """Images of all concepts, drawn at their share."""

    @pytest.mark.parametrize(("broad", "least", "most"), [(0.0, 0, 0), (0.3, 80, 160)])
    def test_share_is_drawn(self, trained: Recipe, broad: float, least: int, most: int):
        images = training_images(trained)
        own = len(images) // 2
        settings = trained.unet.model_copy(update={"broad": broad, "kinds": {"full": 1.0}})
        chosen, _ = Deck(images, World(trained.world), settings, own=own).draw(400, np.random.default_rng(0))
        assert least <= (chosen >= own).sum() <= most

    def test_stage_has_latents_of_all_images(self, trained: Recipe):
        settings = trained.unet.model_copy(update={"broad": 0.3})
        stage = UnetStage(trained.model_copy(update={"unet": settings}))
        assert len(stage.latents) == len(stage.batches.deck.items) == len(broad_images(trained).items)
        assert len(stage.latents) > len(training_images(trained).items)


def test_round_trip_measures_every_kind_of_image(folder: Path, trained: Recipe, tmp_path: Path) -> None:
    figures = roundtrip(trained, folder, tmp_path / "sheet.png")
    assert set(figures) == {"seen", "unseen", "unseen_filters", "dev_cases"}
    vae = AutoencoderTiny.from_pretrained(folder / "vae", torch_dtype=torch.float32)
    errors = []
    for case in load_cases("dev").values():
        real = torch.from_numpy(np.asarray(case.image.resize((32, 32))).copy()).permute(2, 0, 1)[None] / 255
        with torch.no_grad():
            output = vae(2 * real - 1).sample.clamp(-1, 1) / 2 + 0.5
        errors.append(-10 * math.log10(float((output - real).square().mean())))
    assert figures["dev_cases"] == pytest.approx(mean(errors), abs=0.02)
    assert Image.open(tmp_path / "sheet.png").width >= 8 * 32
