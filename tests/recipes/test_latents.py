"""Latents that stage `unet` stores next to the images."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny

from recipes.base import latents
from recipes.base.config import Recipe
from recipes.base.dataset import training_images
from recipes.base.unet import UnetStage


class Calls:
    """Count the images that the encoder encodes, and fail before it encodes more than `limit`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.images, self.limit = 0, 10_000
        original = AutoencoderTiny.encode

        def encode(vae: AutoencoderTiny, pixels: torch.Tensor) -> object:
            if self.images + len(pixels) > self.limit:
                raise KeyboardInterrupt
            self.images += len(pixels)
            return original(vae, pixels)

        monkeypatch.setattr(AutoencoderTiny, "encode", encode)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


@pytest.fixture
def graded(trained: Recipe, tmp_path: Path) -> Recipe:
    """A trained recipe with graded images and no stored latents."""
    shutil.copytree(trained.output, tmp_path / "toy", ignore=shutil.ignore_patterns("latents"))
    unet = trained.unet.model_copy(update={"graded": 0.5})
    return trained.model_copy(update={"output": tmp_path / "toy", "unet": unet})


def test_second_stage_reads_stored_latents(graded: Recipe, calls: Calls) -> None:
    first = UnetStage(graded)
    count = len(training_images(graded))
    assert calls.images == 2 * count
    second = UnetStage(graded)
    assert calls.images == 2 * count
    assert torch.equal(second.latents, first.latents)
    assert second.batches.deck.papers == first.batches.deck.papers
    assert len(first.batches.deck.papers) == count


def test_stopped_stage_keeps_finished_parts(
    graded: Recipe, calls: Calls, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(latents, "PART", 5)
    count = len(training_images(graded))
    calls.limit = count + 7  # all plain images and one graded part
    with pytest.raises(KeyboardInterrupt):
        UnetStage(graded)
    assert calls.images == count + 5
    calls.limit = 10_000
    resumed = UnetStage(graded)
    assert calls.images == 2 * count
    shutil.rmtree(graded.output / "latents")
    straight = UnetStage(graded)
    assert torch.equal(resumed.latents, straight.latents)
    assert resumed.batches.deck.papers == straight.batches.deck.papers


def test_other_images_encoders_and_seeds_are_encoded_again(graded: Recipe, calls: Calls) -> None:
    stage = UnetStage(graded)
    pixels, cpu = training_images(graded).pixels.copy(), torch.device("cpu")

    def encoded(recipe: Recipe = graded) -> int:
        before = calls.images
        latents.stored_latents(recipe, stage.vae, pixels, False, cpu)
        return calls.images - before

    assert encoded() == 0
    pixels[-1] = 255 - pixels[-1]
    assert encoded() == len(pixels)
    assert encoded() == 0
    assert encoded(graded.model_copy(update={"seed": 1})) == len(pixels)
    next(stage.vae.decoder.parameters()).add_(1)
    assert encoded() == 0
    next(stage.vae.encoder.parameters()).add_(1)
    assert encoded() == len(pixels)
